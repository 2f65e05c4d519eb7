"""A method that is taught by each of several teachers."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from mmkd.data.batch import Batch
from mmkd.detectors.record import StepRecord
from mmkd.teachers.several import log_name, named
from mmkd.teachers.view import TeacherView

from .method import Method


class FromEach(Method):
    r"""A method of the config, taught by each of several teachers.

    .. math::
        L = \frac{1}{n} \sum_t L_t

    Each of the n teachers has a copy of the method with adapters of its own.
    The weight is divided among them, so that teachers that agree teach as
    strongly as one of them would alone. Factors of the student's own losses
    apply once. A loss is logged as ``<method>.loss_<part>_<label>``.

    Methods that compare classes teach the classes that student and teacher
    share. Features have no classes, so each teacher's features are imitated
    as a whole.

    Args:
        method: The method; each teacher gets a copy of it.
        labels: The teachers' labels.
    """

    def __init__(self, method: Method, labels: Sequence[str]) -> None:
        super().__init__(loss_weight=method.loss_weight)
        self.of_teacher = nn.ModuleDict(
            {label: copy.deepcopy(method) for label in labels}
        )
        self.needs, self.without = method.needs, method.without
        self.needs_labels = method.needs_labels
        self.reads_objects = method.reads_objects
        self.only_unlabelled = method.only_unlabelled
        self.any_geometry = method.any_geometry

    @property
    def student_paths(self) -> Sequence[str]:
        return [p for _, m in self._each() for p in m.student_paths]

    @property
    def teacher_paths(self) -> Sequence[str]:
        return self._first.teacher_paths

    def prepare(self, student: StepRecord, teacher: TeacherView) -> None:
        views = teacher.each()
        for label, method in self._each():
            with named(log_name(label)):
                method.prepare(student, views[label])

    def task_factors(self) -> Mapping[str, float]:
        return self._first.task_factors()

    def forward(
        self, student: StepRecord, teacher: TeacherView, batch: Batch
    ) -> dict[str, Tensor]:
        losses, views = {}, teacher.each()
        self.statistics = {}
        for label, method in self._each():
            # Not called: the weight is that of this method, and applies once.
            found = method.forward(student, views[label], batch)
            for part, loss in found.items():
                losses[f'{part}_{label}'] = loss / len(self.of_teacher)
            for key, value in method.statistics.items():
                self.statistics[f'{key}_{label}'] = value
        return losses

    def _each(self) -> Iterator[tuple[str, Method]]:
        for label, method in self.of_teacher.items():
            yield label, cast(Method, method)

    @property
    def _first(self) -> Method:
        return next(method for _, method in self._each())
