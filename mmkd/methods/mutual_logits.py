"""Class logits of networks that train together."""

from collections.abc import Mapping, Sequence

from mmdet.structures import DetDataSample

from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError
from mmkd.peers.view import as_teacher

from .class_logits import ClassLogits, check_class_logits, class_logits


def mutual_logits(
    learner: StepRecord,
    target: StepRecord,
    data_samples: Sequence[DetDataSample],
) -> list[ClassLogits]:
    """Pair two networks' class logits of the same priors or RoIs.

    Two-stage networks are compared on the RoIs of both. The target scores the
    learner's RoIs on its own features, and the learner scores the target's
    RoIs with a gradient. Both are divided by the number of all RoIs.

    Returns:
        One pair for one-stage detectors. For two-stage detectors, two pairs
        per stage, the learner's RoIs first. ``student`` is the learner.
    """
    pairs = class_logits(learner, as_teacher(target), data_samples)
    if not learner.facts.is_two_stage:
        return pairs
    swapped = class_logits(target, as_teacher(learner), data_samples)
    joined = []
    for own, other in zip(pairs, swapped, strict=True):
        other = other.replace(student=other.teacher, teacher=other.student)
        number = own.avg_factor + other.avg_factor
        for pair in (own, other):
            joined.append(pair.replace(avg_factor=number))
    return joined


def check_mutual(networks: Mapping[str, StepRecord], method: str) -> None:
    """Check that all networks' class logits can be compared.

    Args:
        networks: The networks' records of a blank image, by name.
        method: The name of the method, for the message.

    Raises:
        ConfigError: If the number, kind or places of the classes differ; the
            message names the networks.
    """
    (leader, first), *others = networks.items()
    for name, other in others:
        try:
            check_class_logits(first, as_teacher(other), method)
            _check_counts(first, other)
        except ConfigError as error:
            raise ConfigError(
                f'{method}: the networks "{leader}" and "{name}" cannot learn '
                f'from each other. With "{name}" as the teacher: {error}'
            ) from error


def _check_counts(first: StepRecord, other: StepRecord) -> None:
    for what, counts in (
        ('classes', [r.facts.classes for r in (first, other)]),
        ('stages of RoI heads', [len(r.facts.rois) for r in (first, other)]),
    ):
        if counts[0] != counts[1]:
            raise ConfigError(
                f'The student has {counts[0]} {what}, the teacher '
                f'{counts[1]}; give both the same number.'
            )
