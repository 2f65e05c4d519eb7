"""Checks of what users pass to the losses."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from mmkd.errors import ConfigError, ShapeError


def check_positive(where: str, **options: float) -> None:
    """Raise ``ConfigError`` for an option that is not finite and above 0."""
    for name, value in options.items():
        _check(_finite(value) and value > 0, where, name, value, 'above 0')


def check_not_negative(where: str, **options: float) -> None:
    """Raise ``ConfigError`` for an option that is not finite and >= 0."""
    for name, value in options.items():
        valid = _finite(value) and value >= 0
        _check(valid, where, name, value, 'at least 0')


def check_choice(where: str, known: Sequence[str], **options: str) -> None:
    """Raise ``ConfigError`` for an option that is none of the known values."""
    shown = ', '.join(map(repr, known))
    for name, value in options.items():
        _check(value in known, where, name, value, f'one of {shown}')


def check_same_shape(where: str, remedy: str = '', **tensors: Tensor) -> None:
    """Raise ``ShapeError`` if the tensors differ in shape."""
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    if len(set(shapes.values())) > 1:
        found = ', '.join(f'{name} {shape}' for name, shape in shapes.items())
        raise ShapeError(
            f'{where} compares tensors of the same shape, got {found}.'
            f'{remedy and " " + remedy}'
        )


def check_axes(where: str, pred: Tensor, axes: str) -> None:
    """Raise ``ShapeError`` if a tensor lacks the axes, such as 'N C'."""
    names = axes.split()
    if pred.dim() != len(names):
        raise ShapeError(
            f'{where} compares tensors ({", ".join(names)}), got '
            f'{tuple(pred.shape)}.'
        )


def _finite(value: Any) -> bool:
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _check(
    valid: bool, where: str, name: str, value: Any, expected: str
) -> None:
    if not valid:
        raise ConfigError(f'{where}.{name} must be {expected}, got {value!r}.')
