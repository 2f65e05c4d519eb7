"""The class logits of both networks for the same priors or RoIs."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from mmdet.structures import DetDataSample
from torch import Tensor

from mmkd.detectors.dense import (
    DenseOutputs,
    DenseTargets,
    student_dense,
    student_targets,
)
from mmkd.detectors.dense_checks import (
    check_dense,
    check_is_dense,
    check_same_priors,
)
from mmkd.detectors.record import StepRecord
from mmkd.detectors.two_stage import (
    check_same_classifiers,
    check_two_stage,
)
from mmkd.errors import ConfigError
from mmkd.losses.chunks import RowLoss, sum_in_chunks
from mmkd.teachers.class_map import ClassMap
from mmkd.teachers.view import DENSE, ROIS, TeacherView

from .feature_base import image_extents

CLASS_LOGITS = (DENSE, ROIS)
"""A teacher of class logits has to give one of these two."""


@dataclass
class ClassLogits:
    """Logits of the S shared classes for M priors or RoIs of B images."""

    prefix: str
    """How the name of a loss starts: ``''``, or ``'s0_'`` in cascades."""
    student: Tensor
    """(M, S), or (M, S + 1) with the background last."""
    teacher: Tensor
    """The teacher's logits in the same shape."""
    sigmoid: bool
    """Whether the columns are independent binary problems."""
    labels: Tensor
    """(M,) the student's targets: 0..S-1, S for the background, -1 for what
    is ignored or has a class that the teacher does not know."""
    weights: Tensor
    """(M,); 0 for what is ignored and for padding."""
    images: Tensor
    """(M,) the image that each belongs to, 0..B-1."""
    avg_factor: float | Tensor
    """The divisor of sums: the number of positives of a dense head, or of
    RoIs, averaged over the processes."""
    classes: int
    """The number S of shared classes."""
    scale: float = 1.0
    """The weight of the stage in a cascade."""

    def objects(self) -> 'ClassLogits':
        """Keep only what has a label of the shared classes."""
        is_object = (self.labels >= 0) & (self.labels < self.classes)
        (index,) = is_object.nonzero(as_tuple=True)
        parts = {
            name: getattr(self, name)[index]
            for name in ('student', 'teacher', 'labels', 'weights', 'images')
        }
        return self.replace(**parts)

    def labelled(self) -> 'ClassLogits':
        """Give what has no label some label, and weight 0."""
        known = self.labels >= 0
        return self.replace(
            labels=self.labels.clamp(min=0), weights=self.weights * known
        )

    def average(self, losses: Tensor) -> Tensor:
        """Return the weighted average of losses (M,) as a scalar."""
        total = (losses * self.weights).sum() / self.avg_factor
        return self.scale * total

    def average_of(self, loss: RowLoss) -> Tensor:
        """Return the weighted average of a loss of the logits as a scalar."""
        return self.average(loss(self.student, self.teacher))

    def replace(self, **changes: Any) -> 'ClassLogits':
        """Return the same with other values of some fields."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return ClassLogits(**{**own, **changes})


class PriorLogits(ClassLogits):
    """Those of dense heads, which are joined only when they are read.

    Args:
        student: The student's predictions.
        teacher: The teacher's.
        targets: What the student's own loss has assigned.
        classes: The class map.
    """

    def __init__(
        self,
        student: DenseOutputs,
        teacher: DenseOutputs,
        targets: DenseTargets,
        classes: ClassMap,
    ) -> None:
        images, priors = targets.labels.shape
        numbers = torch.arange(images, device=targets.labels.device)
        self.prefix = ''
        self.sigmoid = student.sigmoid
        self.labels = shared_labels(targets.labels, classes).flatten()
        self.weights = targets.weights.flatten()
        self.images = numbers.repeat_interleave(priors)
        self.avg_factor = targets.number
        self.classes = len(classes.shared)
        self._dense, self._map = (student, teacher), classes

    @functools.cached_property
    def student(self) -> Tensor:  # type: ignore[override]
        return _of_student(self._dense[0].logits, self._map)

    @functools.cached_property
    def teacher(self) -> Tensor:  # type: ignore[override]
        return _of_teacher(self._dense[1].logits, self._map)

    def average_of(self, loss: RowLoss) -> Tensor:
        def of_shared(ours: Tensor, theirs: Tensor) -> Tensor:
            return loss(
                _of_student(ours, self._map), _of_teacher(theirs, self._map)
            )

        total = sum_over_priors(of_shared, *self._dense, self.weights)
        return total / self.avg_factor


def sum_over_priors(
    loss: RowLoss,
    student: DenseOutputs,
    teacher: DenseOutputs,
    weights: Tensor,
) -> Tensor:
    """Sum a weighted loss of the class logits over all priors.

    Args:
        loss: The loss of each prior; see :func:`.sum_in_chunks`.
        student: The predictions that learn.
        teacher: Their targets.
        weights: The weights of the B * N priors.
    """
    ours, theirs = student.class_maps, teacher.class_maps
    if ours is None or theirs is None:
        ours, theirs = [student.logits], [teacher.logits]
    columns = student.columns, teacher.columns
    return sum_in_chunks(
        loss, ours, theirs, weights.view(student.shape), columns
    )


def class_logits(
    student: StepRecord,
    teacher: TeacherView,
    data_samples: Sequence[DetDataSample],
) -> list[ClassLogits]:
    """Pair the class logits of a step.

    One-stage detectors give the logits of all priors. Two-stage detectors
    give, stage by stage, those of the RoIs that the student was trained on;
    the teacher scores these RoIs on its own features.
    """
    if not student.facts.is_two_stage:
        return [_of_priors(student, teacher, data_samples)]
    stages = range(len(student.rois))
    return [_of_rois(student, teacher, stage) for stage in stages]


@dataclass
class ClassMaps:
    """A level's class logits at the H x W positions of B images.

    A is the number of priors at a position, S that of the shared classes.
    """

    student: Tensor
    """(B, H, W, A, S), or (B, H, W, A, S + 1) with the background last."""
    teacher: Tensor
    """The teacher's logits in the same shape."""
    extents: Sequence[tuple[int, int]]
    """The rows and columns that each image covers; the rest is padding."""

    def images(self, maps: Tensor) -> list[Tensor]:
        """Cut maps (B, H, W, ...) to the P positions of each image.

        Returns:
            (P, ...) of each image, row by row.
        """
        return [
            image[:rows, :columns].flatten(0, 1)
            for image, (rows, columns) in zip(maps, self.extents, strict=True)
        ]


def class_maps(
    student: StepRecord,
    teacher: TeacherView,
    data_samples: Sequence[DetDataSample],
) -> list[ClassMaps]:
    """Pair the class maps of two dense heads, level by level."""
    own, classes = student_dense(student), teacher.class_map
    counts = own.facts.priors_per_point
    shapes = [(*size, n) for size, n in zip(own.sizes, counts, strict=True)]
    images = own.shape[0]
    ours, theirs = (
        logits.unflatten(0, (images, -1)).split([*map(math.prod, shapes)], 1)
        for logits in (
            _of_student(own.logits, classes),
            _of_teacher(teacher.dense.logits, classes),
        )
    )
    return [
        ClassMaps(
            s.unflatten(1, shape),
            t.unflatten(1, shape),
            image_extents(data_samples, tap) or [shape[:2]] * images,
        )
        for s, t, shape, tap in zip(
            ours, theirs, shapes, own.raw[0], strict=True
        )
    ]


def check_class_logits(
    student: StepRecord, teacher: TeacherView, method: str
) -> bool:
    """Check that two networks' class logits can be compared.

    Args:
        student: The student's outputs for a blank image.
        teacher: The teacher's view of that image.
        method: The name of the method, for the message.

    Returns:
        Whether the classes are independent binary problems (sigmoid).

    Raises:
        ConfigError: If they cannot be compared.
    """
    facts, others = student.facts, teacher.facts
    if facts.is_two_stage and others.is_two_stage:
        for role, each in (('student', facts), ('teacher', others)):
            check_two_stage(each, role, method, rpn=False, deltas=False)
        check_same_classifiers(
            facts, others, remedy='use a method on features'
        )
        return facts.rois[0].sigmoid
    own = check_dense(student, 'student', method)
    check_is_dense(others, 'teacher', method)
    other = teacher.dense
    check_same_priors(own.facts, other.facts, method)
    if own.sigmoid != other.sigmoid:
        kinds = {True: 'sigmoid', False: 'softmax with background'}
        raise ConfigError(
            f'{method}: the class logits cannot be compared; those of the '
            f'student belong to a {kinds[own.sigmoid]}, those of the teacher '
            f'to a {kinds[other.sigmoid]}. Train both with the same kind of '
            'loss_cls.'
        )
    return own.sigmoid


def _of_priors(
    student: StepRecord,
    teacher: TeacherView,
    data_samples: Sequence[DetDataSample],
) -> ClassLogits:
    targets = student_targets(student, data_samples)
    own, other = student_dense(student), teacher.dense
    return PriorLogits(own, other, targets, teacher.class_map)


def _of_rois(
    student: StepRecord, teacher: TeacherView, stage: int
) -> ClassLogits:
    sample, facts = student.rois[stage], student.facts.rois[stage]
    classes = teacher.class_map
    assert sample.logits is not None
    cascade = len(student.facts.rois) > 1
    return ClassLogits(
        prefix=f's{stage}_' if cascade else '',
        # The last column is the background, in a sigmoid head as well.
        student=_of_student(sample.logits, classes),
        teacher=_of_teacher(teacher.score_rois(sample, stage).logits, classes),
        sigmoid=facts.sigmoid,
        labels=shared_labels(sample.labels, classes),
        weights=sample.label_weights,
        images=sample.boxes[:, 0].long(),
        avg_factor=sample.number,
        classes=len(classes.shared),
        scale=facts.weight,
    )


def _of_student(logits: Tensor, classes: ClassMap) -> Tensor:
    known = len(classes.student)
    return _shared(logits, classes.student_index, known, classes.identical)


def _of_teacher(logits: Tensor, classes: ClassMap) -> Tensor:
    known = len(classes.teacher)
    return _shared(logits, classes.teacher_index, known, classes.identical)


def _shared(
    logits: Tensor, index: Tensor, known: int, identical: bool
) -> Tensor:
    """Turn (..., K or K + 1) into (M, S or S + 1) with the background."""
    logits = logits.flatten(0, -2)
    if identical:
        return logits
    return torch.cat([logits[:, index], logits[:, known:]], dim=1)


def shared_labels(labels: Tensor, classes: ClassMap) -> Tensor:
    """Renumber labels by the S shared classes.

    Args:
        labels: The student's labels: 0..K-1 for objects, K for the
            background, below 0 for ignored.
        classes: The class map.

    Returns:
        Labels of the same shape: 0..S-1, S for the background, -1 for
        ignored and for classes that the teacher does not know.
    """
    if classes.identical:
        return labels
    shared = len(classes.shared)
    table = torch.full_like(classes.to_teacher, -1)
    table[classes.student_index] = torch.arange(shared, device=table.device)
    table[-1] = shared
    return table[labels.clamp(min=0)].where(labels >= 0, -1)
