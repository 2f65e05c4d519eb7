"""A method that is taught by each of several teachers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from mmdet.structures import DetDataSample
from torch import Tensor, nn

from mmkd.detectors.record import Outputs
from mmkd.errors import ConfigError
from mmkd.registry import METHODS
from mmkd.teachers.several import is_list, is_mean, labelled, named
from mmkd.utils import build_checked

from .method import Method


class FromEach(Method):
    r"""A method of the config, taught by each of several teachers.

    .. math::
        L = \frac{1}{n} \sum_t L_t

    Each of the n teachers has the method with adapters of its own. The
    weight is shared out among them, so that teachers that agree teach as
    strongly as one of them would alone. Factors of the student's own losses
    apply once. A loss is logged as ``<method>.loss_<part>_<label>``.

    Methods that compare classes teach those that student and teacher share;
    features know no classes, and each teacher's are imitated as a whole.

    Args:
        methods: Label of the teacher to method, all of the same config.
    """

    def __init__(self, methods: Mapping[str, Method]) -> None:
        first = next(iter(methods.values()))
        super().__init__(loss_weight=first.loss_weight)
        self.of_teacher = nn.ModuleDict(methods)

    @property
    def student_paths(self) -> Sequence[str]:
        return [p for _, m in self._each() for p in m.student_paths]

    @property
    def teacher_paths(self) -> Sequence[str]:
        return self._first.teacher_paths

    def prepare(self, student: Outputs, teacher: Any) -> None:
        for label, method in self._each():
            with named(f'teacher_{label}'):
                method.prepare(student, teacher[label])

    def task_factors(self) -> Mapping[str, float]:
        return self._first.task_factors()

    def forward(
        self,
        student: Outputs,
        teacher: Any,
        data_samples: Sequence[DetDataSample],
    ) -> dict[str, Tensor]:
        losses = {}
        self.statistics = {}
        for label, method in self._each():
            found = method(student, teacher[label], data_samples)
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


def build_method(name: str, cfg: Mapping[str, Any], teacher: Any) -> Method:
    """Build a method; one for each teacher, if these are in a list.

    Args:
        name: Its name in ``distillation.methods``.
        cfg: Its config.
        teacher: ``distillation.teacher``, if there is one.

    Raises:
        ConfigError: If the config is wrong, or the method cannot learn from
            teachers like these.
    """
    where = f'distillation.methods.{name}'
    method = build_checked(METHODS, cfg, where)
    if method.needs != 'teacher':
        return method
    steers = type(method).guide is not Method.guide
    descriptions = {'': teacher}
    if is_list(teacher):
        if steers:
            raise ConfigError(
                f"{where} ({type(method).__name__}) steers the student's own "
                'loss, which only one teacher can; distillation.teacher is a '
                f'list of {len(teacher)}. Give it a single teacher.'
            )
        descriptions = labelled(teacher, 'distillation.teacher')
    if any(map(is_mean, descriptions.values())):
        check_has_mean(name, method, steers=steers)
    if not is_list(teacher):
        return method
    first, *others = descriptions
    rest = {label: build_checked(METHODS, cfg, where) for label in others}
    return FromEach({first: method, **rest})


def check_has_mean(name: str, method: Any, *, steers: bool) -> None:
    """Check that a method reads nothing but predictions.

    Raises:
        ConfigError: If it reads features, or steers the student's loss.
    """
    if steers or method.teacher_paths:
        what = 'a head that assigns' if steers else 'features of the teacher'
        hint = ' (its hint: set hint=None)' * bool(
            getattr(method, 'hint', None)
        )
        raise ConfigError(
            f'distillation.methods.{name} ({type(method).__name__}) reads '
            f'{what}{hint}: of several networks these do not correspond and '
            'have no mean. Give the method a single teacher'
            f'{"." if steers else ", or a list: teacher=[...]."}'
        )
