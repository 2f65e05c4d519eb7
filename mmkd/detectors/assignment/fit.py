"""Which networks can share an assignment."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from mmengine.structures import InstanceData

from mmkd.detectors.dense_checks import check_same_priors
from mmkd.detectors.record import Outputs
from mmkd.errors import ConfigError

from .replay import reads_predictions, record_assignments, same_priors

if TYPE_CHECKING:
    from mmkd.teachers.class_map import ClassMap

FITTING = (
    'heads whose assignment reads predictions: PAA, TOOD, RTMDet, YOLOX, '
    'DDOD, and any with an assigner that is given boxes and scores'
)


def is_paa(head: Any) -> bool:
    """Whether a head separates candidates by their costs."""
    return hasattr(head, 'paa_reassign') and hasattr(head, 'get_pos_loss')


def dense_head(outputs: Outputs, method: str) -> Any:
    """The head of a one-stage detector.

    Raises:
        ConfigError: If the detector has none that loops over priors.
    """
    model = outputs.model
    head = getattr(model, 'bbox_head', None)
    if head is None or not hasattr(head, 'prior_generator'):
        raise ConfigError(
            f'{method} fits one-stage detectors with priors; '
            f'{type(model).__name__} has '
            f'{type(head).__name__ if head else "no bbox_head"}. It fits '
            f'{FITTING}.'
        )
    return head


def check_dynamic(student: Outputs, teacher: Outputs, method: str) -> None:
    """Check that both heads assign by predictions, and the same priors.

    Lets each assign one object of the blank image.

    Raises:
        ConfigError: If a head's assignment is static, or priors differ.
    """
    head = student.model.bbox_head
    check_same_priors(head, teacher.model.bbox_head, method, shapes=True)
    if is_paa(head):
        return
    recorded = [_blank_assignment(outputs) for outputs in (student, teacher)]
    for role, outputs, record in zip(
        ('student', 'teacher'), (student, teacher), recorded, strict=True
    ):
        if not reads_predictions(record):
            why = 'is static, it does not read predictions'
            if record and not any(record.values()):
                why = 'is not made by its assigner'
            raise ConfigError(
                f'{method}: the assignment of the {role} '
                f'({type(outputs.model.bbox_head).__name__}) '
                f'{why}, so there is nothing to distil. It fits {FITTING}.'
            )
    if not same_priors(*recorded):
        raise ConfigError(
            f'{method}: the two heads assign different priors. Give both the '
            'same prior (anchor) generator and allowed_border.'
        )


def _blank_assignment(outputs: Outputs) -> Any:
    head, maps = outputs.model.bbox_head, outputs.raw('bbox_head')
    device = maps[0][0].device
    gt = InstanceData(
        bboxes=torch.tensor([[32.0, 32.0, 160.0, 160.0]], device=device),
        labels=torch.zeros(1, dtype=torch.long, device=device),
    )
    stride = head.prior_generator.strides[0]
    size = tuple(
        n * s for n, s in zip(maps[0][0].shape[-2:], stride[::-1], strict=True)
    )
    meta = dict(img_shape=size, pad_shape=size, batch_input_shape=size)
    # Some heads count in their loss what they have seen (DDOD).
    counts = copy.deepcopy(
        {k: v for k, v in vars(head).items() if k[0] != '_'}
    )
    try:
        return record_assignments(head, maps, [gt], [meta])
    except (AttributeError, TypeError):  # a head with other losses
        return {}
    finally:
        vars(head).update(counts)


def check_all_classes_known(classes: 'ClassMap', method: str) -> None:
    """Check that the teacher can judge each of the student's objects.

    Raises:
        ConfigError: If it does not know a class.
    """
    if len(classes.shared) < len(classes.student):
        unknown = [n for n in classes.student if n not in classes.teacher]
        raise ConfigError(
            f'{method}: the teacher has to assign every object, but does not '
            f'know {", ".join(unknown)}. Use a teacher of these classes.'
        )
