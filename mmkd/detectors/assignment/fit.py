"""Checks which networks can share an assignment."""

import copy
from typing import Any

import torch
from mmengine.structures import InstanceData

from mmkd.detectors.dense import DenseOutputs
from mmkd.detectors.dense_checks import check_same_priors
from mmkd.detectors.facts import DenseFacts, DetectorFacts
from mmkd.errors import ConfigError

from .replay import reads_predictions, record_assignments, same_priors

FITTING = (
    'heads whose assignment reads predictions: PAA, TOOD, RTMDet, YOLOX, '
    'DDOD, and any with an assigner that is given boxes and scores'
)


def is_paa(head: Any) -> bool:
    """Return whether a head separates candidates by their costs."""
    return hasattr(head, 'paa_reassign') and hasattr(head, 'get_pos_loss')


def dense_facts(facts: DetectorFacts, method: str) -> DenseFacts:
    """Return the facts of a one-stage detector's head.

    Raises:
        ConfigError: If the detector has no head with priors.
    """
    head = getattr(facts.model, 'bbox_head', None)
    if facts.dense is None or not hasattr(head, 'prior_generator'):
        raise ConfigError(
            f'{method} fits one-stage detectors with priors; {facts.name} has '
            f'{type(head).__name__ if head else "no bbox_head"}. It fits '
            f'{FITTING}.'
        )
    return facts.dense


def check_dynamic(
    student: DenseOutputs, teacher: DenseOutputs, method: str
) -> None:
    """Check that both heads assign the same priors by predictions.

    Each of them is tried on one object of the blank image.

    Args:
        student: The student's outputs for a blank image.
        teacher: The teacher's outputs for it.
        method: The name of the method, for the message.

    Raises:
        ConfigError: If a head's assignment is static, or priors differ.
    """
    check_same_priors(student.facts, teacher.facts, method, shapes=True)
    if is_paa(student.facts.head):
        return
    recorded = [_blank_assignment(dense) for dense in (student, teacher)]
    for role, dense, record in zip(
        ('student', 'teacher'), (student, teacher), recorded, strict=True
    ):
        if not reads_predictions(record):
            why = 'is static and does not read predictions'
            if record and not any(record.values()):
                why = 'is not made by its assigner'
            raise ConfigError(
                f'{method}: the assignment of the {role} ({dense.facts.kind}) '
                f'{why}, so there is nothing to distil. It fits {FITTING}.'
            )
    if not same_priors(*recorded):
        raise ConfigError(
            f'{method}: the two heads assign different priors. Give both the '
            'same prior (anchor) generator and allowed_border.'
        )


def _blank_assignment(dense: DenseOutputs) -> Any:
    head, maps = dense.facts.head, dense.raw
    device = maps[0][0].device
    gt = InstanceData(
        bboxes=torch.tensor([[32.0, 32.0, 160.0, 160.0]], device=device),
        labels=torch.zeros(1, dtype=torch.long, device=device),
    )
    stride = dense.facts.strides[0]
    size = tuple(
        n * s for n, s in zip(maps[0][0].shape[-2:], stride[::-1], strict=True)
    )
    meta = dict(img_shape=size, pad_shape=size, batch_input_shape=size)
    # A head that asks no assigner computes its whole loss, and may count.
    counts = copy.deepcopy(
        {k: v for k, v in vars(head).items() if k[0] != '_'}
    )
    try:
        return record_assignments(head, maps, [gt], [meta])
    except (AttributeError, TypeError):  # a head with other losses
        return {}
    finally:
        vars(head).update(counts)
