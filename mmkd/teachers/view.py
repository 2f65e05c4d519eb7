"""The two base classes of every kind of teacher.

A :class:`Teacher` is built once, and its :class:`TeacherView` says what it
makes of one batch. Whatever reads a teacher reads it through these classes.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from mmengine.logging import print_log
from mmengine.structures import InstanceData
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.detectors.dense import DenseOutputs
from mmkd.detectors.facts import DetectorFacts
from mmkd.detectors.record import RoIOutputs, StepRecord
from mmkd.errors import ConfigError

from .class_map import ClassMap

FEATURES = 'features'
DENSE = 'dense predictions'
RPN = 'RPN scores'
ROIS = 'RoI scores'
DETECTIONS = 'detections'
NETWORK = 'a head of MMDetection'
"""These are the things that a teacher may give and a method may need."""


class BoxScores(NamedTuple):
    """A teacher's predictions for the student's boxes."""

    logits: Tensor
    """RPN: (N, 1) for a sigmoid, (N, 2) for a softmax. RoIs: (N, K + 1)."""
    deltas: Tensor | None
    """(N, 4), or (N, 4 K) if class-specific, in the teacher's coding."""
    coder: Any
    """The box coder that decodes them."""


class TeacherView(Protocol):
    """What a teacher gives for one batch; a part is computed when it is read.

    A kind of teacher inherits from this class and overrides what it gives.
    Everything else raises an error that says what is missing.
    """

    class_map: ClassMap
    """The student's classes and the teacher's."""
    cache: dict[str, Any]
    """What methods have derived in this step, to share it."""

    @property
    def facts(self) -> DetectorFacts:
        """What the teacher's heads predict."""
        raise self.lacks('heads')

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """The levels (B, C, H, W) that the heads see."""
        raise self.lacks(FEATURES)

    @property
    def dense(self) -> DenseOutputs:
        """Predictions of a dense head, for every prior."""
        raise self.lacks(DENSE)

    @property
    def detections(self) -> list[InstanceData]:
        """Each image's boxes (xyxy, pixels of the batch), scores, labels."""
        raise self.lacks(DETECTIONS)

    def features(
        self, path: str, student: StepRecord, student_path: str | None = None
    ) -> tuple[Tensor, ...]:
        """Return the output of the module at ``path``, a tensor per level.

        Args:
            path: A module path.
            student: The student's step. A RoI head gets its RoIs.
            student_path: The student's module that it is compared with.
        """
        raise self.lacks(FEATURES)

    def score_anchors(self, sample: RoIOutputs) -> BoxScores:
        """Score the student's sampled anchors with the teacher's RPN."""
        raise self.lacks(RPN)

    def score_rois(self, sample: RoIOutputs, stage: int) -> BoxScores:
        """Score the RoIs of one of the student's stages with the RoI head."""
        raise self.lacks(ROIS)

    def statistics(self) -> dict[str, float]:
        """Return numbers about this step for the log, by name."""
        return {}

    def each(self) -> Mapping[str, 'TeacherView']:
        """Return the views of teachers that teach one by one, by label."""
        return {'': self}

    def parts(self) -> Sequence['TeacherView']:
        """Return the views of the single networks that it consists of."""
        return [self]

    def lacks(self, what: str) -> ConfigError:
        """Return the error that this teacher does not give something."""
        name = type(self).__name__
        return ConfigError(f'a method reads {what}; {name} has none.')


@dataclass(frozen=True)
class TeacherContext:
    """What a teacher is told about the training when it is built."""

    student: Any
    """The student's detector; None where a teacher works without one."""
    classes: Sequence[str]
    """The student's class names; none without a student."""
    paths: Sequence[str] = ()
    """The module paths that methods read from the teacher."""
    named: bool = True
    """Whether the data name the classes; if not, ``classes`` are numbers."""
    class_aliases: Mapping[str, str] = field(default_factory=dict)
    """Names of classes that mean the same, from the config."""

    def class_map(
        self,
        teacher: Sequence[str],
        by_hand: Mapping[str, str | None] | None = None,
    ) -> ClassMap:
        """Match a teacher's classes with the student's.

        Args:
            teacher: The teacher's class names.
            by_hand: The teacher's name of some of the student's classes, or
                None; see :class:`mmkd.ClassMap`.
        """
        student = self.student_classes(teacher)
        return ClassMap(student, teacher, by_hand, self.class_aliases)

    @property
    def device(self) -> torch.device:
        """The device that the student is on."""
        if self.student is None:
            return torch.device('cpu')
        return next(self.student.parameters()).device

    def student_classes(self, teacher: Sequence[str]) -> Sequence[str]:
        """Return the student's class names, or the teacher's with a warning.

        Args:
            teacher: The teacher's class names.

        Raises:
            ConfigError: If the data name no classes, and the student has
                another number of them than the teacher.
        """
        if self.student is None:
            return teacher
        if self.named:
            return self.classes
        if len(teacher) != len(self.classes):
            raise ConfigError(
                'the training data set names no classes, so those of the '
                f'teacher are unknown to it: it has {len(teacher)}, the '
                f'student {len(self.classes)}. Set '
                'metainfo=dict(classes=(...)) on the data set.'
            )
        print_log(
            "The training data set names no classes. The teacher's are "
            f'assumed: {", ".join(teacher)}',
            'current',
            logging.WARNING,
        )
        return teacher


class Teacher:
    """Anything that a student can learn from.

    A kind of teacher inherits from this class, is registered in
    ``mmkd.TEACHERS``, and is chosen by
    ``distillation.teacher = dict(type='…', …)``. In addition to its options,
    its constructor takes the keyword ``context``, a :class:`TeacherContext`.

    It is deliberately not an ``nn.Module``: as a child of the student it
    would be optimised, saved, averaged (EMA) and put into train mode.
    """

    gives: frozenset[str] = frozenset()
    """What its views give, by the names at the top of this module."""
    remedy: str = ''
    """What helps where something is missing: a sentence and a space."""
    class_map: ClassMap

    def view(self, batch: Batch) -> TeacherView:
        """Return its view of the student's batch; nothing runs yet."""
        raise NotImplementedError

    def blank(self, device: torch.device) -> TeacherView:
        """Return its view of one blank image, with which methods prepare."""
        raise NotImplementedError

    def prepare_data(self, dataset: Any) -> None:
        """Check the training data, and let them say what the teacher needs.

        It is called once, before the first image is read.

        Args:
            dataset: The built data set, with all that it wraps.

        Raises:
            ConfigError: If the teacher cannot follow its images.
            DataError: If it knows none of its images.
        """

    @property
    def networks(self) -> Mapping[str, Any]:
        """The frozen detectors that it consists of, by their names in logs."""
        return {}

    def each(self) -> Mapping[str, 'Teacher']:
        """Return the teachers that teach one by one (often this one)."""
        return {'': self}

    def to(self, device: torch.device) -> 'Teacher':
        """Move what it holds to ``device``, in place."""
        return self

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the weights of its network, between rounds of training.

        Args:
            weights: A stock state dict of the same detector.

        Raises:
            ConfigError: If it has no weights of its own.
            CheckpointError: If the weights do not fit exactly.
        """
        raise ConfigError(
            f'distillation.teacher: {type(self).__name__} has no weights that '
            'can be replaced.'
        )

    def describe(self) -> str:
        """Return what it is, for the log."""
        return type(self).__name__

    def __deepcopy__(self, memo: dict[int, Any]) -> 'Teacher':
        return self  # it is frozen, so copies of the student share it


class NoView(TeacherView):
    """The view of a teacher that does not exist."""

    def __init__(self) -> None:
        self.class_map = ClassMap(('none',), ('none',))
        self.cache: dict[str, Any] = {}

    def each(self) -> Mapping[str, TeacherView]:
        return {}

    def parts(self) -> Sequence[TeacherView]:
        return []

    def lacks(self, what: str) -> ConfigError:
        return ConfigError(
            f'a method reads {what} of a teacher, but there is none: add '
            'distillation.teacher.'
        )


class NoTeacher(Teacher):
    """The teacher of networks that only learn from each other."""

    def view(self, batch: Batch) -> TeacherView:
        return NoView()

    def blank(self, device: torch.device) -> TeacherView:
        return NoView()

    def each(self) -> Mapping[str, Teacher]:
        return {}

    def describe(self) -> str:
        return 'no teacher'


def listed(gives: Iterable[str]) -> str:
    """Return what is given or needed, in words."""
    return ', '.join(sorted(gives)) or 'nothing'
