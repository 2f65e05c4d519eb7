"""Matches the classes of the student and the teacher by name."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkd.errors import ConfigError


class ClassMap:
    """Matches the classes of the student and the teacher by name.

    Args:
        student: The student's class names.
        teacher: The teacher's class names.

    Attributes:
        identical: Whether both have the same classes in the same order.
        shared: The names that both have, in the student's order.
        student_index: (S,) the student's indices of the S shared classes.
        teacher_index: (S,) the teacher's indices of the same classes.
        to_teacher: (student's classes + 1,) the teacher's label for each of
            the student's labels and, last, for the background; -1 for a
            class that the teacher does not know.
        to_student: (teacher's classes,) the student's label for each of the
            teacher's labels, or -1.

    Raises:
        ConfigError: If no class is shared, or one network names a class
            twice.

    Example:
        >>> ClassMap(['cat', 'dog'], ['dog', 'cow']).teacher_index
        tensor([0])
    """

    def __init__(self, student: Sequence[str], teacher: Sequence[str]) -> None:
        self.student, self.teacher = tuple(student), tuple(teacher)
        for role in ('student', 'teacher'):
            _check_unique(role, getattr(self, role))
        self.identical = self.student == self.teacher
        self.shared = [name for name in self.student if name in self.teacher]
        if not self.shared:
            raise ConfigError(
                'the teacher and the student share no class name. Student: '
                f'{", ".join(student)}. Teacher: {", ".join(teacher)}. Use a '
                'teacher of the same classes, or give them the same names '
                'through metainfo=dict(classes=...).'
            )
        self.student_index = torch.tensor(
            [self.student.index(name) for name in self.shared]
        )
        self.teacher_index = torch.tensor(
            [self.teacher.index(name) for name in self.shared]
        )
        self.to_teacher = torch.full((len(self.student) + 1,), -1)
        self.to_teacher[self.student_index] = self.teacher_index
        self.to_teacher[-1] = len(self.teacher)
        self.to_student = torch.full((len(self.teacher),), -1)
        self.to_student[self.teacher_index] = self.student_index

    def to(self, device: torch.device | str) -> 'ClassMap':
        """Move the index tensors to ``device``, in place."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def __str__(self) -> str:
        if self.identical:
            return f'identical ({len(self.student)} classes)'
        return (
            f'{len(self.shared)} shared by name: {", ".join(self.shared)} '
            f'(student {len(self.student)}, teacher {len(self.teacher)})'
        )


def _check_unique(role: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f'the {role} names a class twice ({", ".join(twice)}), so classes '
            'cannot be mapped by name. Give every class a name of its own in '
            'metainfo=dict(classes=...).'
        )
