"""Change a teacher so that it computes faster."""

from collections.abc import Iterable, Iterator

import torch
from mmengine.logging import print_log
from torch import nn

from mmkd.errors import ConfigError

from .fold_bn import fold_batch_norms
from .frozen import FrozenDetector
from .probe import probe
from .speed import Speed

COMPILED = ('backbone', 'neck')
"""Heads are left out, because methods tap them and run them in parts."""


def speed_up(
    teacher: FrozenDetector, speed: Speed, device: torch.device
) -> None:
    """Change a teacher in place so that it computes faster.

    Args:
        teacher: The teacher as it was loaded.
        speed: The options.
        device: The device on which it will run.

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
            # On the instance, beneath the taps. A tap is a new function in
            # every step, so everything would be compiled again for it.
            module.forward = torch.compile(module.forward)


def _check_runs(teacher: FrozenDetector, speed: Speed) -> None:
    plain = Speed()
    try:
        faster = probe(teacher)
    except Exception as error:  # any detector, any reason
        teacher.speed = plain
        probe(teacher)  # if this fails too, the options are not the cause
        raise _refusal(teacher, speed, f'fails: {error}') from error
    teacher.speed = plain
    expected = probe(teacher)
    teacher.speed = speed
    lost = [name for name in expected if name not in faster]
    if lost:
        raise _refusal(teacher, speed, f'fails in {", ".join(lost)}')


def _refusal(teacher: FrozenDetector, speed: Speed, why: str) -> ConfigError:
    device = next(teacher.model.parameters()).device.type
    return ConfigError(
        f'distillation.teacher: {type(teacher.model).__name__} with {speed} '
        f'{why} (on a test image, device {device}). Set autocast=None or '
        'channels_last=False.'
    )


def _check_compiler(device: torch.device) -> None:
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(2, device=device))
    except Exception as error:  # PyTorch has many kinds of errors here
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
    """Return the largest parts of backbone and neck without a tap inside.

    A tap on the part itself is no obstacle. Modules without children are not
    worth compiling.
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
