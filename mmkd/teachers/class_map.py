"""How a teacher sees the student's data: its classes and its pixels."""

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.structures import DetDataSample
from torch import Tensor

from mmkd.errors import ConfigError


class ClassMap:
    """Which class of the student is which of the teacher, by name.

    Args:
        student: The student's class names.
        teacher: The teacher's class names.

    Attributes:
        identical: Both have the same classes in the same order.
        shared: The names both have, in the student's order.
        student_index: (S,) the student's indices of the S shared classes.
        teacher_index: (S,) the teacher's indices of the same.
        to_teacher: (student's classes + 1,) the teacher's label for each of
            the student's and, last, for the background; -1 for a class the
            teacher does not know.
        to_student: (teacher's classes,) the student's label for each of the
            teacher's, or -1.

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
                'teacher of the same classes, or name them alike through '
                'metainfo=dict(classes=...).'
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


class Renormalize:
    """Turn the student's normalised batch into the teacher's.

    Undoes the student's mean, std and channel order and applies the
    teacher's. What the batch was padded with becomes the teacher's padding.

    Args:
        student: The student's data preprocessor.
        teacher: The teacher's data preprocessor.

    Attributes:
        needed: Whether the two differ at all.
    """

    def __init__(self, student: Any, teacher: Any) -> None:
        mean_s, std_s = mean_std(student)
        mean_t, std_t = mean_std(teacher)
        self.flip = flips(student) != flips(teacher)
        if self.flip:
            mean_s, std_s = mean_s.flip(0), std_s.flip(0)
        # x_t = (x_s * std_s + mean_s - mean_t) / std_t
        self.scale = (std_s / std_t).view(1, -1, 1, 1)
        self.shift = ((mean_s - mean_t) / std_t).view(1, -1, 1, 1)
        self.pad_value = pad_value(teacher)
        self.needed = bool(
            self.flip
            or not torch.equal(mean_s, mean_t)
            or not torch.equal(std_s, std_t)
            or self.pad_value != pad_value(student)
        )

    def __call__(
        self, inputs: Tensor, data_samples: Sequence[DetDataSample]
    ) -> Tensor:
        """Convert a batch (B, 3, H, W); equal settings return it as it is."""
        if not self.needed:
            return inputs
        if self.flip:
            inputs = inputs.flip(1)
        self.scale = self.scale.to(inputs.device)
        self.shift = self.shift.to(inputs.device)
        result = inputs * self.scale + self.shift
        for image, sample in zip(result, data_samples, strict=True):
            height, width = sample.img_shape[:2]
            image[:, height:] = self.pad_value
            image[:, :, width:] = self.pad_value
        return result


def _check_unique(role: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f'the {role} names a class twice ({", ".join(twice)}), so classes '
            'cannot be mapped by name. Give every class a name of its own in '
            'metainfo=dict(classes=...).'
        )


def mean_std(preprocessor: Any) -> tuple[Tensor, Tensor]:
    if not getattr(preprocessor, '_enable_normalize', False):
        return torch.zeros(3), torch.ones(3)
    mean, std = (
        value.detach().cpu().float().flatten().expand(3)
        for value in (preprocessor.mean, preprocessor.std)
    )
    return mean, std


def flips(preprocessor: Any) -> bool:
    return bool(getattr(preprocessor, '_channel_conversion', False))


def pad_value(preprocessor: Any) -> float:
    return float(getattr(preprocessor, 'pad_value', 0))
