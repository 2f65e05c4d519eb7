"""Kullback-Leibler divergences of a teacher's and a student's logits."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_kl(
    student: Tensor, teacher: Tensor, temperature: float = 1.0
) -> Tensor:
    r"""Divergence of two softmax distributions, each sample's.

    .. math::
        T^2 \sum_c p_{t,c} (\log p_{t,c} - \log p_{s,c}), \qquad
        p = \mathrm{softmax}(z / T)

    Args:
        student: Logits, (..., C).
        teacher: Logits, (..., C); gets no gradient.
        temperature: T, above 0.

    Returns:
        (...), float32, at least 0; 0 where both give the same.

    Example:
        >>> softmax_kl(torch.zeros(2), torch.tensor([0.0, 100.0]))  # log 2
        tensor(0.6931)
    """
    ours = (student.float() / temperature).log_softmax(-1)
    theirs = (teacher.detach().float() / temperature).log_softmax(-1)
    divergence = F.kl_div(ours, theirs, reduction='none', log_target=True)
    return divergence.sum(-1) * temperature**2


def sigmoid_kl(
    student: Tensor, teacher: Tensor, temperature: float = 1.0
) -> Tensor:
    r"""Divergence of independent binary problems, each element's.

    .. math::
        T^2 \left(p_t \log\frac{p_t}{p_s}
        + (1 - p_t) \log\frac{1 - p_t}{1 - p_s}\right), \qquad
        p = \sigma(z / T)

    Args:
        student: Logits of any shape.
        teacher: Logits of the same shape; gets no gradient.
        temperature: T, above 0.

    Returns:
        The shape of ``student``, float32.

    Example:
        >>> sigmoid_kl(torch.zeros(1), torch.tensor([100.0]))  # log 2
        tensor([0.6931])
    """
    ours, theirs = student.float(), teacher.detach().float()
    if temperature == 1:
        return _SigmoidKL.apply(ours, theirs)
    divergence = _SigmoidKL.apply(ours / temperature, theirs / temperature)
    return divergence * temperature**2


class _SigmoidKL(torch.autograd.Function):
    """At temperature 1, with few passes over what may be 10^7 logits.

    The difference of two cross-entropies, softplus(z) - p_t z; its gradient
    is p_s - p_t.
    """

    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor) -> Tensor:
        target = theirs.sigmoid()
        ctx.save_for_backward(ours, target)
        least = F.softplus(theirs).addcmul_(target, theirs, value=-1)
        return F.softplus(ours).addcmul_(target, ours, value=-1).sub_(least)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ours, target = ctx.saved_tensors
        return ours.sigmoid().sub_(target).mul_(gradient), None


class BinaryProblems:
    r"""A network's independent binary problems, for all who learn from it.

    K networks that learn from each other take K sigmoids, logarithms and
    products of their logits, not K (K - 1); as

    .. math::
        \frac{1}{n} \sum_b \mathrm{KL}(p_b \| p)
            = H\Bigl(\frac{1}{n} \sum_b p_b,\, p\Bigr)
              - \frac{1}{n} \sum_b H(p_b),

    with the cross-entropy H(q, p) and the entropy H(p), the average of the
    others is all that a network needs of them.

    Args:
        logits: (..., C).
        temperature: T, above 0.
    """

    def __init__(self, logits: Tensor, temperature: float = 1.0) -> None:
        self.temperature = temperature
        self.logits = logits.float()
        if temperature != 1:
            self.logits = self.logits / temperature
        fixed = self.logits.detach()
        self.probabilities = fixed.sigmoid()
        self.normaliser = F.softplus(fixed).sum(-1)
        self.entropy = self.normaliser - _dot(self.probabilities, fixed)

    def kl_from(self, targets: Sequence['BinaryProblems']) -> Tensor:
        """The mean of :func:`sigmoid_kl` from each target, summed over C.

        Args:
            targets: At least one; they get no gradient.

        Returns:
            (...), float32. 0 where all are equal, up to rounding, which may
            leave it slightly negative.
        """
        first, *others = (target.probabilities for target in targets)
        mean = sum(others, first) / len(targets) if others else first
        first, *others = (target.entropy for target in targets)
        entropy = sum(others, first) / len(targets)
        cross = _CrossEntropy.apply(
            self.logits, self.probabilities, self.normaliser, mean
        )
        return (cross - entropy) * self.temperature**2


class _CrossEntropy(torch.autograd.Function):
    """sum_c softplus(z) - q z; its gradient is p - q."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, own: Tensor, normaliser: Tensor, q: Tensor
    ) -> Tensor:
        ctx.save_for_backward(own, q)
        return normaliser - _dot(q, logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        own, q = ctx.saved_tensors
        return (own - q).mul_(gradient[..., None]), None, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
