"""Several teachers that teach as one: the mean of their outputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.detectors.averaging import (
    CLASSES,
    class_order,
    mean_of,
    meaning,
    reorder_dense,
    reorder_rois,
)
from mmkd.detectors.dense import DenseOutputs, read_dense
from mmkd.detectors.facts import DetectorFacts, read_facts
from mmkd.detectors.record import RoIOutputs, StepRecord
from mmkd.errors import ConfigError, TapError

from .frozen import FrozenDetector, FrozenView
from .record_view import RecordView
from .view import DENSE, ROIS, RPN, BoxScores, Teacher, TeacherView

REMEDY = 'Teachers that differ teach one by one, in a list: teacher=[...].'


class EnsembleTeacher(Teacher):
    r"""One teacher whose predictions are the mean of several teachers'.

    .. math::
        z = \frac{1}{n} \sum_t z_t

    over everything that the heads predict: class logits, deltas, logits of
    bins and of centerness. Logits are averaged, not probabilities. That is
    the normalised geometric mean of softmax probabilities, or the geometric
    mean of the odds of sigmoid probabilities, whatever the temperature of a
    method. (Heads that return probabilities, such as TOOD's, are averaged as
    they are.) A list of teachers, in contrast, has the same gradient in
    :class:`~mmkd.methods.kd.KD` as the arithmetic mean of probabilities.

    It fits methods that read predictions: KD, DKD, DIST, LD, soft labels,
    and Faster R-CNN distillation without its hint. Features of different
    networks do not correspond, so they have no mean.

    Args:
        teachers: The teachers by label. They have the same classes, in any
            order, and heads whose numbers have the same meaning.

    Raises:
        ConfigError: If there is only one teacher, or if they differ; the
            message says in what.
    """

    gives = frozenset({DENSE, RPN, ROIS})
    remedy = (
        'Features, and heads that assign, do not correspond and have no mean: '
        'give the method a single teacher, or a list (teacher=[...]). '
    )

    def __init__(self, teachers: Mapping[str, FrozenDetector]) -> None:
        self.teachers = dict(teachers)
        self.names = [f'teacher_{label}' for label in teachers]
        first, *others = self.teachers.values()
        if not others:
            raise ConfigError(
                'distillation.teacher: a mean takes at least two teachers, '
                'got one. Describe it without "mean".'
            )
        self.class_map = first.class_map
        facts = [_meaning(each) for each in self.teachers.values()]
        for name, other in zip(self.names[1:], facts[1:], strict=True):
            for what in dict.fromkeys((*facts[0], *other)):
                values = facts[0].get(what), other.get(what)
                self._check_same(name, what, *values)

    @property
    def networks(self) -> Mapping[str, Any]:
        return dict(zip(self.names, self.teachers.values(), strict=True))

    def view(self, batch: Batch) -> 'EnsembleView':
        return EnsembleView(
            [each.view(batch) for each in self.teachers.values()]
        )

    def blank(self, device: torch.device) -> TeacherView:
        """Return what the mean makes of a blank image.

        Raises:
            ConfigError: If the teachers' outputs have different shapes.
        """
        views = [each.blank(device) for each in self.teachers.values()]
        shapes = [_shapes(view) for view in views]
        for name, other in zip(self.names[1:], shapes[1:], strict=True):
            self._check_same(name, 'the output shapes', shapes[0], other)
        return EnsembleView(views)

    def to(self, device: torch.device) -> 'EnsembleTeacher':
        for teacher in self.teachers.values():
            teacher.to(device)
        return self

    def describe(self) -> str:
        each = (teacher.describe() for teacher in self.teachers.values())
        return f'the mean of {"; ".join(each)}'

    def _check_same(
        self, name: str, what: str, first: Any, other: Any
    ) -> None:
        if first != other:
            if what == CLASSES:
                first, other = sorted(first - other), sorted(other - first)
            raise ConfigError(
                f'distillation.teacher: {self.names[0]} and {name} have no '
                f'mean; they differ in {what}: {first} and {other}. {REMEDY}'
            )


class EnsembleView(TeacherView):
    """The mean of several teachers' views of a batch."""

    def __init__(self, views: list[Any]) -> None:
        self.views: list[FrozenView] = views
        self.class_map = views[0].class_map
        self.cache: dict[str, Any] = {}

    @property
    def facts(self) -> DetectorFacts:
        """The facts of the first network, which hold for all of them."""
        return self.views[0].facts

    @property
    def dense(self) -> DenseOutputs:
        """The mean, with the classes in the first network's order."""
        if 'dense' not in self.cache:
            facts = self.facts.dense
            assert facts is not None
            raw = [view.raw_dense for view in self.views]
            orders = self._orders(raw[0][0][0].device)
            ordered = [
                reorder_dense(facts, each, order)
                for each, order in zip(raw, orders, strict=True)
            ]
            self.cache['dense'] = read_dense(facts, mean_of(ordered))
        return self.cache['dense']

    def parts(self) -> Sequence[TeacherView]:
        return self.views

    def score_anchors(self, sample: RoIOutputs) -> BoxScores:
        scores = [view.score_anchors(sample) for view in self.views]
        logits, deltas = mean_of([each[:2] for each in scores])
        return BoxScores(logits, deltas, scores[0].coder)

    def score_rois(self, sample: RoIOutputs, stage: int) -> BoxScores:
        scores = [view.score_rois(sample, stage) for view in self.views]
        orders = self._orders(sample.boxes.device)
        logits, deltas = mean_of(
            [
                reorder_rois(each.logits, each.deltas, order)
                for each, order in zip(scores, orders, strict=True)
            ]
        )
        return BoxScores(logits, deltas, scores[0].coder)

    def features(
        self, path: str, student: StepRecord, student_path: str | None = None
    ) -> tuple[Tensor, ...]:
        """Refuse: features have no mean.

        Raises:
            ConfigError: Always.
        """
        raise self.lacks('features')

    def statistics(self) -> dict[str, float]:
        found = [view.statistics() for view in self.views]
        return {
            key: sum(each.get(key, value) for each in found) / len(found)
            for key, value in found[0].items()
        }

    def lacks(self, what: str) -> ConfigError:
        return ConfigError(
            f'the {what} of several networks do not correspond and have no '
            f'mean. {REMEDY}'
        )

    def _orders(self, device: torch.device) -> list[Tensor | None]:
        first = self.class_map.teacher
        return [
            class_order(first, view.class_map.teacher, device)
            for view in self.views
        ]


def _meaning(teacher: FrozenDetector) -> dict[str, Any]:
    return meaning(read_facts(teacher.model), teacher.classes)


def _shapes(view: TeacherView) -> dict[str, list[tuple[int, ...]]]:
    """Return the shapes of what the standard heads gave, if they ran."""
    assert isinstance(view, RecordView)
    shapes = {}
    for path in ('rpn_head', 'bbox_head'):
        try:
            found = view.features(path)
        except TapError:
            continue
        shapes[path] = [tuple(tensor.shape) for tensor in found]
    return shapes
