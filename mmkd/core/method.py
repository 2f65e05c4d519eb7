"""What every distillation method is to the Distiller."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar

from mmdet.structures import DetDataSample
from torch import Tensor, nn

from mmkd.detectors.record import Outputs
from mmkd.errors import ConfigError

if TYPE_CHECKING:
    from mmkd.teachers.frozen_view import TeacherOutputs


class Method(nn.Module):
    """A distillation method: losses from a student's and a teacher's outputs.

    A subclass implements :meth:`forward` or :meth:`guide`, and
    :meth:`prepare` where it has adapters or fits only certain detectors.

    Args:
        loss_weight: Weight of all its losses, at least 0. At 0 the method is
            switched off and its part of the step costs nothing.

    Raises:
        ConfigError: If the weight is negative or not finite.
    """

    needs: ClassVar[str] = 'teacher'
    """What it distils from: ``'teacher'``, or ``'peers'`` for a method that
    ties networks that train together; its ``teacher`` may be None."""

    def __init__(self, *, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.check_not_negative(loss_weight=loss_weight)
        self.loss_weight = loss_weight
        self.statistics: dict[str, Tensor] = {}
        """Of the last step, logged as ``<method>.<name>``."""

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
        """Refuse options that are none of the known values."""
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

    def prepare(self, student: Outputs, teacher: Outputs) -> None:
        """Check that the networks fit and build the adapters.

        Called once, before the optimiser is built.

        Args:
            student: The student's outputs for one blank image, with those of
                its peers.
            teacher: The teacher's outputs for the same image.
        """

    def task_factors(self) -> Mapping[str, float]:
        """Factors of the student's own losses at full weight.

        Returns:
            Regular expression of a stock loss' whole name to its factor.
        """
        return {}

    def guide(
        self,
        student: Outputs,
        teacher: 'TeacherOutputs',
        data_samples: Sequence[DetDataSample],
    ) -> AbstractContextManager[None]:
        """A context within which the networks compute their own losses.

        For methods that steer these, such as an assignment of labels.

        Args:
            student: The student and its peers; nothing is recorded yet.
            teacher: The teacher's outputs for the batch.
            data_samples: The batch's ground truth and meta data.
        """
        return nullcontext()

    def forward(
        self,
        student: Outputs,
        teacher: 'TeacherOutputs',
        data_samples: Sequence[DetDataSample],
    ) -> dict[str, Tensor]:
        """The method's losses for one batch.

        Args:
            student: What the student's own loss has produced.
            teacher: The teacher's outputs for the same batch, computed when
                they are read.
            data_samples: The batch's ground truth and meta data.

        Returns:
            Name to scalar; it is logged as ``<method>.loss_<name>``.
        """
        return {}
