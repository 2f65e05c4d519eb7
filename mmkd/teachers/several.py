"""Several teachers that teach one by one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mmkd.data.batch import Batch
from mmkd.errors import CheckpointError, ConfigError, TapError

from .view import Teacher, TeacherView


class SeveralTeachers(Teacher):
    """Teachers that teach one by one, each its own classes.

    Each has its own class map and its own view of the batch's pixels.

    Args:
        teachers: The teachers by label.
    """

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        self.teachers = dict(teachers)
        self.class_map = next(iter(teachers.values())).class_map
        self.gives = frozenset.intersection(
            *(teacher.gives for teacher in teachers.values())
        )

    @property
    def networks(self) -> Mapping[str, Any]:
        return {
            f'teacher_{label}{name.removeprefix("teacher")}': network
            for label, teacher in self.teachers.items()
            for name, network in teacher.networks.items()
        }

    def each(self) -> Mapping[str, Teacher]:
        return self.teachers

    def view(self, batch: Batch) -> 'SeveralViews':
        return SeveralViews(
            {name: each.view(batch) for name, each in self.teachers.items()}
        )

    def blank(self, device: torch.device) -> 'SeveralViews':
        return SeveralViews(
            {name: each.blank(device) for name, each in self.teachers.items()}
        )

    def prepare_data(self, dataset: Any) -> None:
        for label, teacher in self.teachers.items():
            with named(log_name(label)):
                teacher.prepare_data(dataset)

    def to(self, device: torch.device) -> 'SeveralTeachers':
        for teacher in self.teachers.values():
            teacher.to(device)
        return self

    def describe(self) -> str:
        return '; '.join(
            f'{label}: {teacher.describe()}'
            for label, teacher in self.teachers.items()
        )


class SeveralViews(TeacherView):
    """What each of several teachers makes of a batch, by label."""

    def __init__(self, views: Mapping[str, TeacherView]) -> None:
        self.views = dict(views)
        self.class_map = next(iter(views.values())).class_map
        self.cache: dict[str, Any] = {}

    def each(self) -> Mapping[str, TeacherView]:
        return self.views

    def parts(self) -> Sequence[TeacherView]:
        return [part for view in self.views.values() for part in view.parts()]

    def lacks(self, what: str) -> ConfigError:
        return ConfigError(
            f'a method reads {what} of a list of teachers as if it were one. '
            'Give it a single teacher.'
        )


def log_name(label: str) -> str:
    """Return a labelled teacher's name in logs and messages."""
    return f'teacher_{label}' if label else 'teacher'


@contextmanager
def named(teacher: str) -> Iterator[None]:
    """Let errors begin with the name of their teacher."""
    try:
        yield
    except (ConfigError, CheckpointError, TapError) as error:
        raise type(error)(f'{teacher}: {error}') from error
