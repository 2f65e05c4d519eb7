"""What networks that train together show each other."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from mmdet.structures import DetDataSample
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .class_logits import ClassLogits, check_class_logits, class_logits
from .outputs import BoxSample, Outputs, box_heads, class_count
from .teacher_view import ClassMap
from .utils import ConfigError

if TYPE_CHECKING:
    from .teacher import TeacherOutputs


class PeerView:
    """A network in training in the place of a teacher.

    It has the parts of :class:`~mmkd.teacher.TeacherOutputs` that logits,
    boxes and maps of images are read from. Whoever uses it as a target stops
    the gradient.

    Args:
        outputs: What the network has produced in this step.
        learns: Whether others' RoIs are scored with a gradient.
    """

    def __init__(self, outputs: Outputs, *, learns: bool) -> None:
        self.model = outputs.model
        self.cache = outputs.cache
        self.class_map = _same_classes(class_count(self.model) or 0)
        self._outputs, self._learns = outputs, learns
        # Kept there, so that all views of a step have the same.
        self._roi_scores: dict[int, tuple[BoxSample, Any]]
        self._roi_scores = self.cache.setdefault(f'RoIs, {learns=}', {})

    @property
    def dense(self) -> Any:
        """What a one-stage detector's head returned in its own loss."""
        return self._outputs.raw('bbox_head')

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """What the heads saw: the levels of the tap ``'neck'``."""
        return self._outputs.features('neck')

    def features(self, path: str, *_: object) -> tuple[Tensor, ...]:
        """The output of the module at ``path``, a tensor a level."""
        return self._outputs.features(path)

    def score_rois(
        self, sample: BoxSample, stage: int
    ) -> tuple[Tensor, Tensor | None]:
        """The network's RoI head on another's RoIs, on its own features.

        Its running statistics (batch norm) stay those of its own training.

        Returns:
            Logits (N, K+1) and deltas (N, 4 or 4K).
        """
        # With the sample itself, so that its id stays its own.
        if id(sample) not in self._roi_scores:
            head = self.model.roi_head
            cascade = isinstance(head.bbox_head, nn.ModuleList)
            arguments = [self.maps, sample.boxes]
            with torch.set_grad_enabled(self._learns), _held_statistics(head):
                result = head._bbox_forward(*[stage] * cascade, *arguments)
            self._roi_scores[id(sample)] = (sample, result)
        result = self._roi_scores[id(sample)][1]
        return result['cls_score'], result['bbox_pred']


def as_teacher(outputs: Outputs, *, learns: bool = True) -> 'TeacherOutputs':
    """A network in the place of a teacher, for all that read it in a step.

    The outputs must not know their view: what refers to itself is freed late,
    and a step's maps with it.

    Args:
        outputs: Of the network that stands in the place of a teacher.
        learns: Whether it learns itself from what it is compared with.
    """
    return cast('TeacherOutputs', PeerView(outputs, learns=learns))


@functools.cache
def _same_classes(number: int) -> ClassMap:
    """Networks that train together train on the same labels."""
    names = [str(label) for label in range(number)]
    return ClassMap(names, names)


@contextmanager
def _held_statistics(head: nn.Module) -> Iterator[None]:
    """Batch norms use the batch's statistics, and do not keep them."""
    norms = [
        module
        for module in head.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def networks_of(student: Outputs) -> dict[str, Outputs]:
    """The networks that train together by name; the first is the student."""
    return {'student': student, **student.peers}


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
