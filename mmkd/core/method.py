"""The base class of all distillation methods."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Real
from typing import Any, ClassVar

from mmdet.structures import DetDataSample
from torch import Tensor, nn

from mmkd.data.batch import Batch
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError
from mmkd.teachers.view import TeacherView
from mmkd.utils import Official

Need = str | tuple[str, ...]
"""A name of what teachers give, or a tuple of which one is enough."""


class Method(nn.Module):
    """A distillation method: losses from a student's and a teacher's outputs.

    A subclass implements :meth:`forward` or :meth:`steer`. It implements
    :meth:`prepare` as well if it has adapters or fits only certain detectors.
    The attributes below state what it needs.

    Calling a method returns its losses times its weight; :meth:`forward` is
    the bare formula. A method within another one can therefore not lose its
    weight.

    Args:
        loss_weight: Weight of all its losses, at least 0. At 0 the method is
            switched off and its part of the step costs nothing.

    Raises:
        ConfigError: If the weight is negative or not finite.
    """

    learns_from: ClassVar[str] = 'teacher'
    """``'teacher'``, or ``'peers'`` if the method ties networks that train
    together; then there may be no teacher."""
    needs: Sequence[Need] = ()
    """What the teacher has to give. If it is empty, any teacher will do."""
    without: Mapping[str, str] = {}
    """The option, in words, with which the method does without a need."""
    needs_labels: bool = True
    """Whether it reads the ground truth of images. If not, it also learns
    from unlabelled images."""
    reads_objects: bool = False
    """Whether it reads where the student's own loss finds objects. On
    unlabelled images these are the teacher's confident detections."""
    only_unlabelled: bool = False
    """Whether it learns from unlabelled images alone."""
    any_geometry: bool = False
    """Whether the student's view of an unlabelled image may be moved against
    the teacher's; then it compares boxes only."""
    steers: bool = False
    """Whether it steers the networks' own losses by :meth:`steer`."""
    official: ClassVar[Sequence[Official]] = ()
    """The authors' code; empty if there is none for detection."""

    def __init__(self, *, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.check_not_negative(loss_weight=loss_weight)
        self.loss_weight = loss_weight
        self.statistics: dict[str, Tensor] = {}
        """Numbers about the last step, logged as ``<method>.<name>``."""

    def __call__(
        self,
        student: StepRecord,
        teacher: TeacherView,
        batch: Batch,
        scale: float = 1.0,
    ) -> dict[str, Tensor]:
        """Return the losses of :meth:`forward`, times weight and ``scale``."""
        weight = self.loss_weight * scale
        losses = super().__call__(student, teacher, batch)
        return {part: weight * loss for part, loss in losses.items()}

    def check_positive(self, **options: float) -> None:
        """Refuse options that are not finite numbers above 0."""
        for name, value in options.items():
            self._check_number(name, value)
            self.check_option(value > 0, name, value, 'above 0')
            self.check_option(value < math.inf, name, value, 'finite')

    def check_not_negative(self, **options: float) -> None:
        """Refuse options that are not finite numbers of at least 0."""
        for name, value in options.items():
            self._check_number(name, value)
            self.check_option(value >= 0, name, value, 'at least 0')
            self.check_option(value < math.inf, name, value, 'finite')

    def check_whole(self, least: int, **options: int) -> None:
        """Refuse options that are not whole numbers of at least ``least``."""
        for name, value in options.items():
            self._check_number(name, value)
            whole = isinstance(value, Integral)
            self.check_option(whole, name, value, 'a whole number')
            self.check_option(value >= least, name, value, f'at least {least}')

    def check_choice(self, known: Sequence[Any], **options: Any) -> None:
        """Refuse options that are not one of the known values."""
        shown = ', '.join(map(repr, known))
        for name, value in options.items():
            self.check_option(value in known, name, value, f'one of {shown}')

    def check_option(
        self, valid: bool, name: str, value: Any, what: str
    ) -> None:
        """Refuse an option; ``what`` says what it must be."""
        if not valid:
            raise ConfigError(
                f'{type(self).__name__}.{name} must be {what}, got {value!r}'
            )

    def _check_number(self, name: str, value: Any) -> None:
        number = isinstance(value, Real) and not isinstance(value, bool)
        self.check_option(number, name, value, 'a number')

    @property
    def student_paths(self) -> Sequence[str]:
        """Module paths that the method reads from the student."""
        return ()

    @property
    def teacher_paths(self) -> Sequence[str]:
        """Module paths that the method reads from the teacher."""
        return ()

    @property
    def peer_paths(self) -> Sequence[str]:
        """Module paths that the method reads from every peer."""
        return ()

    def prepare(self, student: StepRecord, teacher: TeacherView) -> None:
        """Check that the networks fit and build the adapters.

        It is called once, before the optimiser is built.

        Args:
            student: The student's outputs for one blank image, with those of
                its peers.
            teacher: The teacher's view of the same image.
        """

    def task_factors(self) -> Mapping[str, float]:
        """Return factors of the student's own losses at full weight.

        Returns:
            A factor for each regular expression that matches the whole name
            of a stock loss.
        """
        return {}

    def steer(
        self, student: StepRecord, teacher: TeacherView, batch: Batch
    ) -> AbstractContextManager[Sequence[DetDataSample] | None]:
        """Return a context in which the networks compute their own losses.

        It is for methods that change what these losses train on, such as the
        assignment of labels. They set :attr:`steers`. What the context yields
        is the ground truth that the student's own loss is given; None stands
        for that of the batch. Other methods and peers always get the latter.

        Args:
            student: The student and its peers; nothing is recorded yet.
            teacher: What the teacher makes of the batch.
            batch: The images, their ground truth and meta data.
        """
        return nullcontext()

    def forward(
        self, student: StepRecord, teacher: TeacherView, batch: Batch
    ) -> dict[str, Tensor]:
        """Return the method's losses for one batch, without the weight.

        Methods that need no labels are called once more for a batch of
        unlabelled images, of which ``batch.weak`` is what the teacher sees.

        Args:
            student: What the student's own loss has produced.
            teacher: What the teacher makes of the batch, computed when it is
                read.
            batch: The images, their ground truth and meta data.

        Returns:
            A scalar for each name, logged as ``<method>.loss_<name>``.
        """
        return {}
