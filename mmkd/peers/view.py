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
    """A network in training, read like a teacher.

    Whoever uses its outputs as targets stops the gradient.

    Args:
        record: What the network has produced in this step.
        learns: Whether others' RoIs are scored with a gradient.
    """

    def __init__(self, record: StepRecord, *, learns: bool) -> None:
        super().__init__(record, _same_classes(record.facts.classes or 0))
        self._learns = learns
        # Kept in the record, so that all views of a step share them.
        self._roi_scores: dict[int, tuple[RoIOutputs, Any]]
        self._roi_scores = self.cache.setdefault(f'RoIs, {learns=}', {})

    def score_rois(self, sample: RoIOutputs, stage: int) -> BoxScores:
        """Score another network's RoIs with the own RoI head and features.

        The running statistics (batch norm) stay those of its own training.
        """
        # The sample is kept, so that no other one gets its id.
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
    """Return a network's view that is read like that of a teacher.

    Args:
        record: The record of the network that takes the teacher's place.
        learns: Whether it also learns from what it is compared with.
    """
    return PeerView(record, learns=learns)


@functools.cache
def _same_classes(number: int) -> ClassMap:
    """Return the class map of networks that train on the same labels."""
    names = [str(label) for label in range(number)]
    return ClassMap(names, names)


def networks_of(student: StepRecord) -> dict[str, StepRecord]:
    """Return the networks that train together by name, the student first."""
    return {'student': student, **student.peers}
