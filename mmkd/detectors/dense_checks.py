"""Checks whether dense heads fit a method and each other."""

import copy
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import nn

from mmkd.errors import ConfigError, TapError
from mmkd.utils import alone

from .dense import DenseOutputs, assigned, student_dense
from .facts import DenseFacts, DetectorFacts, is_class_agnostic, priors_of
from .record import ASSIGNING, StepRecord


def check_dense(record: StepRecord, role: str, method: str) -> DenseOutputs:
    """Check that a network has a dense head, and read its blank outputs.

    The assignment of the head is tried, too.

    Args:
        record: The network's outputs for a blank image.
        role: ``'student'`` or a peer's name.
        method: The name of the method, for the message.

    Raises:
        ConfigError: If it has no dense head, or one whose assignment cannot
            be read. A transformer's queries do not count, because those of
            two detectors do not correspond.
    """
    check_is_dense(record.facts, role, method)
    dense = student_dense(record)
    _check_assignment(dense, role, method)
    return dense


def check_is_dense(facts: DetectorFacts, role: str, method: str) -> None:
    """Check that a detector has a dense head that can be read.

    Raises:
        ConfigError: If it has none; the message says why.
    """
    reason = _why_not_dense(facts)
    if reason is not None:
        raise ConfigError(
            f'{method} fits detectors with a dense head, such as RetinaNet, '
            f'FCOS, ATSS and GFL; the {role} is {facts.name}: {reason}. Use a '
            'method on features, such as mmkd.FeatureHint.'
        )


def _why_not_dense(facts: DetectorFacts) -> str | None:
    if facts.dense is None and hasattr(facts.model, 'decoder'):
        return (
            'its queries do not belong to places in the image, so those of '
            'two detectors do not correspond'
        )
    if facts.dense is None:
        return 'it has no dense head'
    if is_class_agnostic(facts.model):
        return 'it tells objects from background, but not classes'
    if hasattr(facts.dense.head, 'loc_filter_thr'):
        return (
            f'its {facts.dense.kind} predicts its anchors, and as a teacher '
            '(in eval mode) scores only some of one image'
        )
    return None


def _check_assignment(dense: DenseOutputs, role: str, method: str) -> None:
    """Let the head's own loss assign one object of the blank image.

    A loss that needs more than boxes and labels (such as masks) cannot be
    tried in this way; its assignment is first read in the first step.
    """
    stand_in = nn.Module()  # holds a copy, as some heads count in their loss
    recorder = StepRecord(stand_in)
    try:
        stand_in.bbox_head = copy.deepcopy(dense.facts.head)
        with alone(), torch.no_grad(), recorder.recording():
            _blank_loss(stand_in.bbox_head, dense.raw)
    except Exception:  # any head, any reason: see docstring
        return
    try:
        calls = recorder.dense_targets
    except TapError as error:
        raise ConfigError(
            f'{method} asks which priors the {role} trains on which object; '
            f'the loss of its {dense.facts.kind} makes no assignment that can '
            f'be read (it calls none of {", ".join(ASSIGNING)}). Use a method '
            'on features, such as mmkd.FeatureHint.'
        ) from error
    assigned(dense, calls)


def _blank_loss(head: Any, raw: Any) -> None:
    """Compute the loss for outputs of one image with one object."""
    # New lists, because FSAF writes into them.
    maps = [list(part) if isinstance(part, list) else part for part in raw]
    stride = priors_of(head).strides[0]
    height, width = maps[0][0].shape[-2:]
    size = (height * stride[1], width * stride[0])
    device = maps[0][0].device
    box = [size[1] / 4, size[0] / 4, size[1] / 2, size[0] / 2]
    objects = InstanceData(
        bboxes=torch.tensor([box], device=device),
        labels=torch.zeros(1, dtype=torch.long, device=device),
    )
    meta = dict(img_shape=size, pad_shape=size, batch_input_shape=size)
    head.loss_by_feat(*maps, [objects], [meta])


def check_same_priors(
    student: DenseFacts,
    teacher: DenseFacts,
    method: str,
    *,
    centres: bool = False,
    shapes: bool = False,
) -> None:
    """Check that the priors of two dense heads correspond one to one.

    Strides and the number of priors per point must be equal. Where there are
    several per point, their shapes must be equal, too; a single prior may
    have another shape, and points may be compared with anchors.

    Args:
        student: The facts of the student's head.
        teacher: The facts of the teacher's head.
        method: The name of the method, for the message.
        centres: Also require equal centres, for methods on boxes.
        shapes: Also require equal shapes, for methods on assignments.

    Raises:
        ConfigError: If they do not correspond.
    """
    facts: list[tuple[str, Any, Any]] = [
        ('strides', student.strides, teacher.strides),
        (
            'priors per point',
            student.priors_per_point,
            teacher.priors_per_point,
        ),
    ]
    if shapes:
        first = student.first_priors(), teacher.first_priors()
        facts.append(('first priors', *first))
    elif centres:
        facts.append(('first centres', _centres(student), _centres(teacher)))
    for what, mine, other in facts:
        if list(mine) != list(other):
            raise ConfigError(
                f'{method}: the priors of the two dense heads do not '
                f'correspond: the student has the {what} {mine}, the teacher '
                f'{other}. Give both the same anchor_generator (or strides).'
            )
    if max(student.priors_per_point) > 1 and not all(
        torch.allclose(a.cpu(), b.cpu())
        for a, b in zip(
            student.generator.base_anchors,
            teacher.generator.base_anchors,
            strict=True,
        )
    ):
        raise ConfigError(
            f'{method}: the several anchors per point of the two dense heads '
            'have different shapes. Give both the same anchor_generator.'
        )


def _centres(facts: DenseFacts) -> list[tuple[float, float]]:
    """Return the centre of each level's first prior, in pixels."""
    first = [priors[0] for priors in facts.first_priors()]
    if facts.has_anchors:
        return [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in first]
    return [(x, y) for x, y, *_ in first]
