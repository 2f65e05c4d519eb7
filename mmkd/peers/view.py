"""What networks that train together show each other."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmkd.detectors.record import BoxSample, Outputs, class_count
from mmkd.teachers.class_map import ClassMap

if TYPE_CHECKING:
    from mmkd.teachers.frozen_view import TeacherOutputs


class PeerView:
    """A network in training in the place of a teacher.

    It has the parts of :class:`.TeacherOutputs` that logits,
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
