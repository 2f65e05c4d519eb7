"""Batch norms of a frozen detector, folded into its convolutions."""

import functools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from mmcv.cnn.bricks.wrappers import Conv2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmkd.detectors.record import intercepted
from mmkd.errors import ConfigError

from .frozen import FrozenDetector
from .probe import difference, probe

PLAIN_CONVOLUTIONS = (nn.Conv2d, Conv2d)
"""These use their weight as it is; a subclass may standardise it."""
TOLERANCE = 1e-3
"""A share of an output's largest value; rounding makes about 1e-5."""

Pair = tuple[nn.Conv2d, _BatchNorm]


def fold_batch_norms(teacher: FrozenDetector) -> int:
    r"""Fold norms into the convolutions before them, in place.

    .. math::
        W' = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} W, \qquad
        b' = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} (b - \mu) + \beta

    Which norm follows which convolution is not read from the order of the
    children, as in MMCV's ``fuse_conv_bn``, but found with a test image: a
    pair is folded if every output of the convolution enters this norm
    unchanged, and nothing else does. Heads whose levels share convolutions or
    norms (RetinaSepBN, RTMDet) therefore keep them. A convolution that a
    method reads is left alone. An ``Identity`` takes the place of the norm,
    and its output is that of the norm.

    Returns:
        The number of norms that were folded.

    Raises:
        ConfigError: If the detector answers differently afterwards.
    """
    model, paths = teacher.model, set(teacher.paths)
    read = [m for name, m in model.named_modules() if name in paths]
    with watched(model) as flow:
        before = probe(teacher)
    pairs = [(c, n) for c, n in flow.pairs() if not _among(c, read)]
    for convolution, norm in pairs:
        _fold(convolution, norm)
    identities = {id(norm): nn.Identity().eval() for _, norm in pairs}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in identities:
                module._modules[name] = identities[id(child)]
    worst, where = difference(probe(teacher), before)
    if worst > TOLERANCE:
        raise ConfigError(
            f'distillation.teacher.fold_bn: with its batch norms folded, '
            f'{type(model).__name__} answers differently to a test image: '
            f'by {worst:.2g} of the largest value in {where}, expected at '
            f'most {TOLERANCE}. Set fold_bn=False.'
        )
    return len(pairs)


def _among(module: nn.Module, modules: Iterable[nn.Module]) -> bool:
    return any(module is other for other in modules)


def _fold(convolution: nn.Conv2d, norm: _BatchNorm) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = (variance + norm.eps).rsqrt()
    shift = -mean * scale
    if norm.affine:
        scale = scale * norm.weight.double()
        shift = norm.bias.double() - mean * scale
    weight = convolution.weight.double() * scale.view(-1, 1, 1, 1)
    if convolution.bias is not None:
        shift = shift + convolution.bias.double() * scale
    dtype = convolution.weight.dtype
    convolution.weight = _frozen(weight.to(dtype))
    convolution.bias = _frozen(shift.to(dtype))


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=False)


class Flow:
    """Records which convolution's output has entered which batch norm."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[nn.Conv2d, Tensor, int]] = {}
        self._calls: dict[nn.Conv2d, int] = {}
        self._sources: dict[_BatchNorm, list[nn.Conv2d | None]] = {}

    def left(self, module: nn.Conv2d, output: Tensor, *_: Any) -> None:
        """Take down that a convolution has returned ``output``."""
        # The tensor is kept, so that no other one gets its id.
        self._made[id(output)] = (module, output, output._version)
        self._calls[module] = self._calls.get(module, 0) + 1

    def entered(self, module: _BatchNorm, _: Tensor, entered: Tensor) -> None:
        """Take down that a norm was given ``entered``."""
        made = self._made.get(id(entered))
        unchanged = made is not None and made[2] == entered._version
        source = made[0] if made is not None and unchanged else None
        self._sources.setdefault(module, []).append(source)

    def pairs(self) -> Iterator[Pair]:
        """Yield the convolutions and norms that only meet each other."""
        for norm, sources in self._sources.items():
            source = sources[0]
            if (
                source is not None
                and all(other is source for other in sources)
                and self._calls[source] == len(sources)
            ):
                yield source, norm


@contextmanager
def watched(model: nn.Module) -> Iterator[Flow]:
    """Watch the layers that run within the context."""
    flow = Flow()
    with ExitStack() as stack:
        for module in model.modules():
            watch: Any = None
            if type(module) in PLAIN_CONVOLUTIONS and not _hooked(module):
                watch = flow.left
            elif isinstance(module, _BatchNorm) and not _hooked(module):
                watch = flow.entered if _is_fixed(module) else None
            if watch:
                seen = functools.partial(watch, module)
                stack.enter_context(intercepted(module, 'forward', seen))
        yield flow


def _hooked(module: nn.Module) -> bool:
    """Return whether a hook changes its weights or values in a call."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def _is_fixed(norm: _BatchNorm) -> bool:
    return norm.running_mean is not None and not norm.training
