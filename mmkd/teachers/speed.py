"""Faster teachers: the same network, computed in less time."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmkd.errors import ConfigError

from .fold_bn import fold_batch_norms
from .probe import probe

if TYPE_CHECKING:
    from .frozen import Teacher

DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16}
COMPILED = ('backbone', 'neck')
"""Heads are not: methods read into them and run them in parts."""


@dataclass(frozen=True)
class Speed:
    """How a teacher is computed; by default as it is.

    Args:
        fold_bn: Fold batch norms into the convolutions before them.
        channels_last: Compute with the channels of a pixel side by side.
        autocast: ``'bfloat16'`` or ``'float16'``: compute in half precision;
            what methods read is single precision.
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
        """The batch in the network's memory format."""
        if self.channels_last:
            return inputs.contiguous(memory_format=torch.channels_last)
        return inputs

    def computing(self, device: torch.device) -> AbstractContextManager:
        """In which the network runs."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, DTYPES[self.autocast])

    def leaving(self, outputs: Any) -> Any:
        """What methods read: plain tensors, in single precision."""
        if self.autocast is None and not self.channels_last:
            return outputs
        return changed(outputs, self._plain)

    def _plain(self, value: Tensor) -> Tensor:
        if self.autocast is not None and value.dtype in DTYPES.values():
            value = value.float()
        return value.contiguous()


SPEED_OPTIONS = tuple(field.name for field in fields(Speed))


def changed(outputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested outputs with every tensor changed."""
    if isinstance(outputs, Tensor):
        return change(outputs)
    if isinstance(outputs, Mapping):
        return {key: changed(value, change) for key, value in outputs.items()}
    if isinstance(outputs, list | tuple):
        return type(outputs)(changed(value, change) for value in outputs)
    return outputs


def speed_up(teacher: 'Teacher', speed: Speed, device: torch.device) -> None:
    """Change a teacher to be computed faster, in place.

    Args:
        teacher: As it was loaded.
        speed: The options.
        device: On which it will run.

    Raises:
        ConfigError: If the network does not run with an option.
    """
    if speed.fold_bn:
        count = fold_batch_norms(teacher)
        print_log(f'{count} batch norms of the teacher folded', 'current')
    if speed.channels_last:
        teacher.model.to(memory_format=torch.channels_last)
    teacher.speed = speed
    if speed.channels_last or speed.autocast:
        teacher.to(device)
        _check_runs(teacher, speed)
    if speed.compile:
        _check_compiler(device)
        for module in compiled_parts(teacher.model, teacher.paths):
            # On the instance, beneath the taps: a tap is another function in
            # every step, for which all would be compiled again.
            module.forward = torch.compile(module.forward)


def _check_runs(teacher: 'Teacher', speed: Speed) -> None:
    plain = Speed()
    try:
        faster = probe(teacher)
    except Exception as error:  # any detector, any reason
        teacher.speed = plain
        probe(teacher)  # if this fails as well, it is not for the options
        raise _refusal(teacher, speed, f'fails: {error}') from error
    teacher.speed = plain
    expected = probe(teacher)
    teacher.speed = speed
    lost = [name for name in expected if name not in faster]
    if lost:
        raise _refusal(teacher, speed, f'fails in {", ".join(lost)}')


def _refusal(teacher: 'Teacher', speed: Speed, why: str) -> ConfigError:
    device = next(teacher.model.parameters()).device.type
    return ConfigError(
        f'distillation.teacher: {type(teacher.model).__name__} with {speed} '
        f'{why} (on a test image, device {device}). Set autocast=None, or '
        'else channels_last=False.'
    )


def _check_compiler(device: torch.device) -> None:
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(2, device=device))
    except Exception as error:  # of PyTorch's many kinds
        reason = str(error).strip().partition('\n')[0]
        raise ConfigError(
            'distillation.teacher.compile: torch.compile does not work here '
            f'({type(error).__name__}: {reason}). It needs a C++ compiler '
            '(g++) on the CPU and Triton on a GPU. Install it, or set '
            'compile=False.'
        ) from error


def compiled_parts(
    model: nn.Module, paths: Iterable[str]
) -> Iterator[nn.Module]:
    """The largest parts of backbone and neck with no tap within them.

    A tap on the part itself is no obstacle; modules without parts of their
    own are not worth it.
    """
    paths = tuple(paths)
    for name in COMPILED:
        part = getattr(model, name, None)
        if isinstance(part, nn.Module):
            yield from _untapped(part, name, paths)


def _untapped(
    module: nn.Module, path: str, paths: tuple[str, ...]
) -> Iterator[nn.Module]:
    children = dict(module.named_children())
    container = isinstance(module, nn.ModuleList | nn.ModuleDict)
    within = any(tapped.startswith(f'{path}.') for tapped in paths)
    if children and not within and not container:
        yield module
    else:
        for name, child in children.items():
            yield from _untapped(child, f'{path}.{name}', paths)


def eagerly(speed: Speed) -> AbstractContextManager:
    """Within it, what is compiled runs as it was written."""
    if speed.compile:
        return torch.compiler.set_stance('force_eager')
    return contextlib.nullcontext()
