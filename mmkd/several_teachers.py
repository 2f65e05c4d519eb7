"""Several frozen teachers: one by one, or as their mean."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from .checkpoint import CheckpointError
from .mean_teacher import MeanOutputs, MeanTeacher, check_has_mean
from .methods import Method
from .outputs import Outputs, TapError
from .registry import METHODS
from .teacher import Teacher, TeacherOutputs, build_teacher
from .utils import ConfigError, build_checked, check_options


class SeveralTeachers:
    """Teachers that teach one by one, each its own classes.

    Each has its own class map and its own view of the batch's pixels.

    Args:
        teachers: Label to teacher.
    """

    def __init__(self, teachers: Mapping[str, Teacher | MeanTeacher]) -> None:
        self.teachers = dict(teachers)

    @property
    def networks(self) -> dict[str, Teacher]:
        """The frozen networks by their names in logs."""
        return {
            f'teacher_{label}{name.removeprefix("teacher")}': network
            for label, teacher in self.teachers.items()
            for name, network in teacher.networks.items()
        }

    def __call__(
        self, inputs: Tensor, data_samples: Sequence[DetDataSample]
    ) -> dict[str, TeacherOutputs | MeanOutputs]:
        """View the student's batch (B, 3, H, W); nothing runs yet."""
        return {
            label: teacher(inputs, data_samples)
            for label, teacher in self.teachers.items()
        }

    def to(self, device: torch.device | str) -> 'SeveralTeachers':
        """Move the networks to ``device``, in place."""
        for teacher in self.teachers.values():
            teacher.to(device)
        return self

    def blank(
        self, run: Callable[[Any, Iterable[str]], Outputs]
    ) -> dict[str, Outputs]:
        """Each teacher's outputs for a blank image."""
        return {
            label: teacher.blank(run)
            for label, teacher in self.teachers.items()
        }


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


def views_of(teacher: Any) -> dict[str, Any]:
    """What a step's methods see of the teachers, by their names in logs."""
    if isinstance(teacher, Mapping):
        return {f'teacher_{label}': view for label, view in teacher.items()}
    return {'teacher': teacher}


def single_views(teacher: Any) -> list[TeacherOutputs]:
    """What a step reads of each frozen network, those of a mean too."""
    return [
        single
        for view in views_of(teacher).values()
        for single in getattr(view, 'views', [view])
    ]


def cache_hits(teacher: Any) -> dict[str, float]:
    """The share of what a step asked of each teacher's cache that it knew."""
    rates = {}
    for name, view in views_of(teacher).items():
        views = getattr(view, 'views', [view])
        asked = sum(single.asked for single in views)
        if asked:
            hits = sum(single.hits for single in views)
            rates[f'{name}.cache_hits'] = hits / asked
    return rates


# ------------------------------------------------------------------- building


def build_teachers(cfg: Any, **options: Any) -> Any:
    """Build what ``distillation.teacher`` describes.

    Args:
        cfg: The description of a teacher (see
            :func:`~mmkd.teacher.build_teacher`); a list of such, to be
            taught by each; or ``dict(mean=[...])`` of such, to be taught by
            their mean, also within a list. A description in a list may
            carry a ``label`` for the log; the labels are numbers otherwise.
        options: Those of :func:`~mmkd.teacher.build_teacher`.

    Returns:
        A :class:`~mmkd.teacher.Teacher`, :class:`SeveralTeachers` or
        :class:`~mmkd.mean_teacher.MeanTeacher`.

    Raises:
        ConfigError: If a description is wrong, or the teachers do not fit.
        CheckpointError: If a checkpoint does not fit its config exactly.
    """
    if is_list(cfg):
        return SeveralTeachers(_build_each(cfg, 'teacher', **options))
    if not is_mean(cfg):
        return build_teacher(cfg, **options)
    check_options('distillation.teacher', cfg, ('mean',))
    for each in labelled(cfg['mean'], 'distillation.teacher.mean').values():
        if is_list(each) or is_mean(each):
            raise ConfigError(
                'distillation.teacher.mean takes descriptions of single '
                f'teachers, got {each!r}. Write all of them into one list.'
            )
    return MeanTeacher(_build_each(cfg['mean'], 'teacher', **options))


def _build_each(cfgs: Any, name: str, **options: Any) -> dict[str, Any]:
    teachers = {}
    for label, cfg in labelled(cfgs, 'distillation.teacher').items():
        if is_list(cfg):
            raise ConfigError(
                f'distillation.teacher: a list within the list, {cfg!r}. '
                'Write all teachers into one.'
            )
        with named(f'{name}_{label}'):
            teachers[label] = build_teachers(cfg, **options)
    return teachers


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


def described(cfg: Any, name: str = 'teacher') -> dict[str, Any]:
    """The description of each frozen network, by its name in logs."""
    parts = cfg['mean'] if is_mean(cfg) else cfg
    if not is_list(parts):
        return {name: parts}
    result = {}
    for label, each in labelled(parts, 'distillation.teacher').items():
        result.update(described(each, f'{name}_{label}'))
    return result


def is_list(cfg: Any) -> bool:
    """Whether teachers are described that teach one by one."""
    return isinstance(cfg, list | tuple)


def is_mean(cfg: Any) -> bool:
    """Whether teachers are described that teach as their mean."""
    return isinstance(cfg, Mapping) and 'mean' in cfg


def labelled(cfgs: Any, where: str) -> dict[str, Any]:
    """Label to description, without the labels in them.

    Raises:
        ConfigError: If there are none, or labels are no words or not unique.
    """
    if not is_list(cfgs) or not cfgs:
        raise ConfigError(
            f'{where} must be a list of descriptions of teachers, such as '
            f'[dict(config=..., checkpoint=...), ...], got {cfgs!r}.'
        )
    found: dict[str, Any] = {}
    for number, cfg in enumerate(cfgs, 1):
        label = str(number)
        if isinstance(cfg, Mapping) and 'label' in cfg:
            cfg = dict(cfg)
            label = cfg.pop('label')
            _check_label(label, where)
        if label in found:
            raise ConfigError(
                f'{where}: two teachers have the label "{label}". Give each '
                'a label of its own.'
            )
        found[label] = cfg
    return found


def _check_label(label: Any, where: str) -> None:
    word = isinstance(label, str) and label.replace('_', '').isalnum()
    if not word or hasattr(nn.ModuleDict(), label):
        raise ConfigError(
            f'{where}: {label!r} cannot be a label, it is a part of the names '
            'of losses and weights. Choose a word such as "coco".'
        )


@contextmanager
def named(teacher: str) -> Iterator[None]:
    """Let errors begin with the teacher that they are about."""
    try:
        yield
    except (ConfigError, CheckpointError, TapError) as error:
        raise type(error)(f'{teacher}: {error}') from error
