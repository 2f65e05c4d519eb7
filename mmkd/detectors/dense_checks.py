"""Whether dense heads fit a method, and each other."""

import copy
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import nn

from mmkd.errors import ConfigError, TapError

from .dense import (
    DenseOutputs,
    assigned,
    is_class_agnostic,
    priors_of,
    read_dense,
)
from .record import ASSIGNING, Outputs


def check_dense(outputs: Outputs, role: str, method: str) -> DenseOutputs:
    """Check that a detector has a dense head, and read its blank outputs.

    Args:
        outputs: The detector's outputs for a blank image.
        role: ``'student'``, ``'teacher'`` or a peer's name. Nobody reads what
            a teacher assigns; any other network's assignment is tried.
        method: The method that asks, for the message.

    Raises:
        ConfigError: If it has none, or assigns in no way that can be read; a
            transformer's queries are none, since those of two detectors do
            not correspond.
    """
    model = outputs.model
    reason = _why_not_dense(model)
    if reason is not None:
        raise ConfigError(
            f'{method} fits detectors with a dense head, such as RetinaNet, '
            f'FCOS, ATSS and GFL; the {role} is {type(model).__name__}: '
            f'{reason}. Use a method on features, such as mmkd.FeatureHint.'
        )
    dense = read_dense(model.bbox_head, outputs.raw('bbox_head'))
    if role != 'teacher':
        _check_assignment(dense, outputs, role, method)
    return dense


def _why_not_dense(model: Any) -> str | None:
    head = getattr(model, 'bbox_head', None)
    if priors_of(head) is None and hasattr(model, 'decoder'):
        return (
            'its queries stand for no place in the image, so that those of '
            'two detectors do not correspond'
        )
    if priors_of(head) is None:
        return 'it has no dense head'
    if is_class_agnostic(model):
        return 'it tells objects from background, but no classes'
    if hasattr(head, 'loc_filter_thr'):
        return (
            f'its {type(head).__name__} predicts its anchors, and as a '
            'teacher (in eval mode) scores only some of one image'
        )
    return None


def _check_assignment(
    dense: DenseOutputs, outputs: Outputs, role: str, method: str
) -> None:
    """Let the head's own loss assign one object of the blank image.

    A loss that asks for more than boxes and labels (masks) cannot be tried
    so; its assignment is read for the first time in the first step.
    """
    stand_in = nn.Module()  # with a copy: some heads count in their loss
    recorder = Outputs(stand_in)
    try:
        stand_in.bbox_head = copy.deepcopy(dense.head)
        with torch.no_grad(), recorder.recording():
            _blank_loss(stand_in.bbox_head, outputs.raw('bbox_head'))
    except Exception:  # any head, any reason: see docstring
        return
    try:
        calls = recorder.dense_targets
    except TapError as error:
        name = type(dense.head).__name__
        raise ConfigError(
            f'{method} asks which priors the {role} trains on which object; '
            f'the loss of its {name} makes no assignment that can be read '
            f'(it calls none of {", ".join(ASSIGNING)}). Use a method on '
            'features, such as mmkd.FeatureHint.'
        ) from error
    assigned(dense, calls)


def _blank_loss(head: Any, raw: Any) -> None:
    """The loss for outputs of one image with one object."""
    # Lists anew: FSAF writes into them.
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
    student: Any,
    teacher: Any,
    method: str,
    *,
    centres: bool = False,
    shapes: bool = False,
) -> None:
    """Check that the priors of two dense heads correspond one to one.

    Strides and the number of priors a point must be equal; of several, the
    shapes too, which are otherwise free (points may meet anchors).

    Args:
        student: The student's head.
        teacher: The teacher's head.
        method: The method that asks, for the message.
        centres: They must also stand at the same places, as boxes ask for.
        shapes: They must be equal altogether, as assignments ask for.

    Raises:
        ConfigError: If they do not.
    """
    ours, theirs = priors_of(student), priors_of(teacher)
    facts = [
        (
            'strides',
            [tuple(stride) for stride in ours.strides],
            [tuple(stride) for stride in theirs.strides],
        ),
        ('priors a point', ours.num_base_priors, theirs.num_base_priors),
    ]
    if shapes:
        facts.append(('first priors', _first(ours), _first(theirs)))
    elif centres:
        facts.append(('first centres', _centres(ours), _centres(theirs)))
    for what, mine, other in facts:
        if list(mine) != list(other):
            raise ConfigError(
                f'{method}: the priors of the two dense heads do not '
                f'correspond, the student has the {what} {mine}, the teacher '
                f'{other}. Give both the same anchor_generator (or strides).'
            )
    if max(ours.num_base_priors) > 1 and not all(
        torch.allclose(a.cpu(), b.cpu())
        for a, b in zip(ours.base_anchors, theirs.base_anchors, strict=True)
    ):
        raise ConfigError(
            f'{method}: the several anchors a point of the two dense heads '
            'have other shapes. Give both the same anchor_generator.'
        )


def _first(generator: Any) -> list[list[list[float]]]:
    """The priors at each level's first position, in pixels."""
    ones = [(1, 1)] * generator.num_levels
    return [p.tolist() for p in generator.grid_priors(ones, device='cpu')]


def _centres(generator: Any) -> list[tuple[float, float]]:
    """The centre of each level's first prior, in pixels."""
    first = [priors[0] for priors in _first(generator)]
    if hasattr(generator, 'base_anchors'):
        return [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in first]
    return [(x, y) for x, y, *_ in first]
