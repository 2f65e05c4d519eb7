"""Class logits of networks that train together."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmdet.structures import DetDataSample

from mmkd.detectors.record import Outputs, box_heads, class_count
from mmkd.errors import ConfigError
from mmkd.peers.view import as_teacher

from .class_logits import ClassLogits, check_class_logits, class_logits


def mutual_logits(
    learner: Outputs,
    target: Outputs,
    data_samples: Sequence[DetDataSample],
) -> list[ClassLogits]:
    """Pair two networks' class logits of the same priors or RoIs.

    Two-stage networks are compared on the RoIs of both: the learner's,
    which the target scores on its own features, and the target's, which the
    learner scores, with a gradient; both are divided by the number of all.

    Returns:
        One-stage: one pair. Two-stage: two a stage, the learner's RoIs
        first. ``student`` of each is the learner.
    """
    pairs = class_logits(learner, as_teacher(target), data_samples)
    if not box_heads(learner.model):
        return pairs
    swapped = class_logits(target, as_teacher(learner), data_samples)
    joined = []
    for own, other in zip(pairs, swapped, strict=True):
        other = dataclasses.replace(
            other, student=other.teacher, teacher=other.student
        )
        number = own.avg_factor + other.avg_factor
        for pair in (own, other):
            joined.append(dataclasses.replace(pair, avg_factor=number))
    return joined


def check_mutual(networks: Mapping[str, Outputs], method: str) -> None:
    """Check that all networks' class logits can be compared.

    Args:
        networks: By name, with their outputs for a blank image.
        method: The method that asks, for the message.

    Raises:
        ConfigError: If the classes' number, kind or places differ; names the
            networks.
    """
    (first, ours), *others = networks.items()
    for name, theirs in others:
        try:
            check_class_logits(ours, theirs, method)
            _check_counts(ours.model, theirs.model)
        except ConfigError as error:
            raise ConfigError(
                f'{method}: the networks "{first}" and "{name}" cannot learn '
                f'from each other. "{name}" in the place of a teacher: '
                f'{error}'
            ) from error


def _check_counts(ours: Any, theirs: Any) -> None:
    for what, count in (
        ('classes', class_count),
        ('stages of RoI heads', lambda model: len(box_heads(model))),
    ):
        if count(ours) != count(theirs):
            raise ConfigError(
                f'The student has {count(ours)} {what}, the teacher '
                f'{count(theirs)}; give both as many.'
            )
