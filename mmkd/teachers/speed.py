"""Options with which the same teacher takes less time."""

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mmkd.errors import ConfigError

DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16}


@dataclass(frozen=True)
class Speed:
    """How a teacher computes; by default, as it was written.

    Args:
        fold_bn: Fold batch norms into the convolutions before them.
        channels_last: Compute with the channels of a pixel side by side.
        autocast: ``'bfloat16'`` or ``'float16'`` to compute in half
            precision. What methods read is still single precision.
        compile: Compile backbone and neck with ``torch.compile``.

    Raises:
        ConfigError: If an option has another value.
    """

    fold_bn: bool = False
    channels_last: bool = False
    autocast: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ('fold_bn', 'channels_last', 'compile'):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigError(
                    f'distillation.teacher.{name} must be True or False, got '
                    f'{value!r}.'
                )
        if self.autocast is not None and self.autocast not in DTYPES:
            raise ConfigError(
                'distillation.teacher.autocast must be one of '
                f'{", ".join(DTYPES)} or None, got {self.autocast!r}.'
            )

    def entering(self, inputs: Tensor) -> Tensor:
        """Return the batch in the network's memory format."""
        if self.channels_last:
            return inputs.contiguous(memory_format=torch.channels_last)
        return inputs

    def computing(self, device: torch.device) -> AbstractContextManager:
        """Return a context for the network to run in."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, DTYPES[self.autocast])

    def leaving(self, outputs: Any) -> Any:
        """Return what methods read: plain tensors in single precision."""
        if self.autocast is None and not self.channels_last:
            return outputs
        return changed(outputs, self._plain)

    def _plain(self, value: Tensor) -> Tensor:
        if self.autocast is not None and value.dtype in DTYPES.values():
            value = value.float()
        return value.contiguous()


SPEED_OPTIONS = tuple(field.name for field in fields(Speed))


def changed(outputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return nested outputs with every tensor changed."""
    if isinstance(outputs, Tensor):
        return change(outputs)
    if isinstance(outputs, Mapping):
        return {key: changed(value, change) for key, value in outputs.items()}
    if isinstance(outputs, list | tuple):
        return type(outputs)(changed(value, change) for value in outputs)
    return outputs


def eagerly(speed: Speed) -> AbstractContextManager:
    """Return a context in which compiled parts run as they were written."""
    if speed.compile:
        return torch.compiler.set_stance('force_eager')
    return contextlib.nullcontext()
