"""What networks that train together show each other."""

import functools
from typing import Any

import torch

from mmkd.detectors.passes import run_roi_head
from mmkd.detectors.record import RoIOutputs, StepRecord
from mmkd.teachers.class_map import ClassMap
from mmkd.teachers.record_view import RecordView
from mmkd.teachers.view import BoxScores, TeacherView


class PeerView(RecordView):
    """A network in training in the place of a teacher.

    Whoever uses it as a target stops the gradient.

    Args:
        record: What the network has produced in this step.
        learns: Whether others' RoIs are scored with a gradient.
    """

    def __init__(self, record: StepRecord, *, learns: bool) -> None:
        super().__init__(record, _same_classes(record.facts.classes or 0))
        self._learns = learns
        # Kept there, so that all views of a step have the same.
        self._roi_scores: dict[int, tuple[RoIOutputs, Any]]
        self._roi_scores = self.cache.setdefault(f'RoIs, {learns=}', {})

    def score_rois(self, sample: RoIOutputs, stage: int) -> BoxScores:
        """The network's RoI head on another's RoIs, on its own features.

        Its running statistics (batch norm) stay those of its own training.
        """
        # With the sample itself, so that its id stays its own.
        if id(sample) not in self._roi_scores:
            model = self.record.model
            with torch.set_grad_enabled(self._learns):
                result = run_roi_head(
                    model, self.maps, sample.boxes, stage, hold=True
                )
            self._roi_scores[id(sample)] = (sample, result)
        result = self._roi_scores[id(sample)][1]
        coder = self.facts.rois[stage].coder
        return BoxScores(result['cls_score'], result['bbox_pred'], coder)


def as_teacher(record: StepRecord, *, learns: bool = True) -> TeacherView:
    """A network in the place of a teacher, for all that read it in a step.

    Args:
        record: Of the network that stands in the place of a teacher.
        learns: Whether it learns itself from what it is compared with.
    """
    return PeerView(record, learns=learns)


@functools.cache
def _same_classes(number: int) -> ClassMap:
    """Networks that train together train on the same labels."""
    names = [str(label) for label in range(number)]
    return ClassMap(names, names)


def networks_of(student: StepRecord) -> dict[str, StepRecord]:
    """The networks that train together by name; the first is the student."""
    return {'student': student, **student.peers}
