"""Layers between a student's feature and its teacher's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.errors import ConfigError

MAX_ROUNDING = 1.5
"""Sizes differ by rounding below this factor, or by less than 2."""


def build_adapter(
    student: Tensor, teacher: Tensor, *, adapt: bool, where: str
) -> nn.Module:
    """Build the adaptation layer from one tapped feature to another.

    Args:
        student: A feature of the student, (B, C_s, H, W) or (N, C_s).
        teacher: The teacher's feature, of the same rank, with C_t channels.
        adapt: True for a 1x1 convolution between maps or a linear layer
            between vectors, even at equal widths; False for the identity.
        where: The place in the config, for messages.

    Raises:
        ConfigError: If one is a map and the other a vector, or if widths
            differ without ``adapt``.
    """
    if student.dim() != teacher.dim() or student.dim() not in (2, 4):
        raise ConfigError(
            f"{where}: the student's feature {tuple(student.shape)} cannot be "
            f"compared with the teacher's {tuple(teacher.shape)}: both must "
            'be maps (B, C, H, W) or both vectors (N, C). Tap modules of the '
            'same kind.'
        )
    width_s, width_t = student.shape[1], teacher.shape[1]
    if adapt:
        if student.dim() == 4:
            return nn.Conv2d(width_s, width_t, 1)
        return nn.Linear(width_s, width_t)
    if width_s != width_t:
        raise ConfigError(
            f'{where}: without adaptation the widths must be equal, the '
            f'student has {width_s} channels, the teacher {width_t}. Set '
            'adapt=True.'
        )
    return nn.Identity()


def resize_to(feature: Tensor, size: torch.Size) -> Tensor:
    """Resize maps (B, C, H, W) to ``size`` (bilinear); keep vectors."""
    if feature.dim() != 4 or feature.shape[-2:] == size[-2:]:
        return feature
    return F.interpolate(
        feature, size=tuple(size[-2:]), mode='bilinear', align_corners=False
    )


def check_levels(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], where: str
) -> None:
    """Check that both have the same number of levels.

    Raises:
        ConfigError: If they have not.
    """
    if len(student) != len(teacher):
        raise ConfigError(
            f'{where}: the student gives {len(student)} levels, the teacher '
            f'{len(teacher)}. Choose as many of each with `levels` and '
            '`teacher_levels`.'
        )


def check_sizes(
    student: tuple[Tensor, ...],
    teacher: tuple[Tensor, ...],
    *,
    resize: bool,
    where: str,
) -> None:
    """Check that paired levels have sizes that can be compared.

    Raises:
        ConfigError: If, without ``resize``, sizes differ by more than
            rounding.
    """
    for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
        for a, b in zip(s.shape[2:], t.shape[2:], strict=True):
            if resize or abs(a - b) < 2:
                continue
            if max(a, b) >= MAX_ROUNDING * min(a, b):
                raise ConfigError(
                    f'{where}: level {level} is {tuple(s.shape[2:])} in the '
                    f'student and {tuple(t.shape[2:])} in the teacher, a '
                    'factor rather than rounding: these levels have different '
                    'strides. Pair levels with `levels` and '
                    '`teacher_levels`, or set resize=True to interpolate.'
                )
