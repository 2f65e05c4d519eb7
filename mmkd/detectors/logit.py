"""Logits of the heads that predict probabilities."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

LEAST_LOG = -100.0
"""PyTorch's binary cross-entropy takes no logarithm below."""
LEAST_VARIANCE = 1e-12
"""It divides its gradient by p (1 - p), but by no less than this."""
HIGHEST = 1 - 2**-24
"""The largest float32 below 1."""


def logit(probabilities: Tensor) -> Tensor:
    r"""Return :math:`\log p - \log(1 - p)`, finite and with a gradient.

    A loss of these logits has the gradient of the binary cross-entropy of the
    probabilities, whichever they are: no probability is too small to learn,
    as it would be if it were clamped. The gradient of
    :func:`torch.nn.functional.binary_cross_entropy` fades below
    :math:`p = 10^{-12}`, and so does this one.

    Args:
        probabilities: Any shape, from 0 to 1.

    Returns:
        The logits, same shape, from -100 to 16.6, float32.

    Example:
        >>> import torch
        >>> from mmkd.detectors.logit import logit
        >>> logit(torch.tensor([0.0, 1e-9, 0.5, 1.0]))
        tensor([-100.0000,  -20.7233,    0.0000,   16.6355])
    """
    return _Logit.apply(probabilities.float())


class _Logit(Function):
    @staticmethod
    def forward(ctx: Any, probabilities: Tensor) -> Tensor:
        p = probabilities.clamp(max=HIGHEST)
        ctx.save_for_backward(p)
        return p.log().clamp_(min=LEAST_LOG).sub_(torch.log1p(-p))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        return gradient / (p * (1 - p)).clamp_(min=LEAST_VARIANCE)
