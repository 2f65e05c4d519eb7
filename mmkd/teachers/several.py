"""Several frozen teachers: one by one, or as their mean."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from mmkd.detectors.record import Outputs
from mmkd.errors import CheckpointError, ConfigError, TapError
from mmkd.utils import check_options

from .ensemble import MeanOutputs, MeanTeacher
from .frozen import Teacher, build_teacher
from .frozen_view import TeacherOutputs


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
            :func:`~mmkd.teachers.frozen.build_teacher`); a list of such, to be
            taught by each; or ``dict(mean=[...])`` of such, to be taught by
            their mean, also within a list. A description in a list may
            carry a ``label`` for the log; the labels are numbers otherwise.
        options: Those of :func:`~mmkd.teachers.frozen.build_teacher`.

    Returns:
        A :class:`~mmkd.teachers.frozen.Teacher`, :class:`SeveralTeachers` or
        :class:`~mmkd.teachers.ensemble.MeanTeacher`.

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
