"""The record of a detector's step, read like a teacher's view."""

from typing import Any

from torch import Tensor

from mmkd.detectors.dense import DenseOutputs, student_dense
from mmkd.detectors.facts import DetectorFacts
from mmkd.detectors.record import StepRecord

from .class_map import ClassMap
from .view import TeacherView


class RecordView(TeacherView):
    """The record of a detector's step, read like a teacher's view.

    The record must not know its view. Objects in a circle are freed late, and
    the maps of a step with them.

    Args:
        record: The record of the detector's own pass.
        class_map: The student's classes and the detector's.
    """

    def __init__(self, record: StepRecord, class_map: ClassMap) -> None:
        self.record, self.class_map = record, class_map
        self.cache: dict[str, Any] = record.cache

    @property
    def facts(self) -> DetectorFacts:
        return self.record.facts

    @property
    def maps(self) -> tuple[Tensor, ...]:
        return self.record.features('neck')

    @property
    def dense(self) -> DenseOutputs:
        return student_dense(self.record)

    @property
    def raw_dense(self) -> Any:
        """What the dense head itself returned."""
        return self.record.raw('bbox_head')

    def features(self, path: str, *_: object) -> tuple[Tensor, ...]:
        return self.record.features(path)
