"""Kullback-Leibler divergences of a teacher's and a student's logits."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from mmkd.registry import MODELS

from .checks import check_positive, check_same_shape
from .reduction import PairLoss

REMEDY = 'For class logits, select the classes that both networks have first.'


def softmax_kl(
    pred: Tensor, target: Tensor, temperature: float = 1.0
) -> Tensor:
    r"""Compute the divergence of two softmax distributions, by sample.

    .. math::
        T^2 \sum_c p_{t,c} (\log p_{t,c} - \log p_{s,c}), \qquad
        p = \mathrm{softmax}(z / T)

    The last axis may hold classes, the bins of a box side (as in LD), or the
    positions of a channel (as in CWD).

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural
    Network", 2015, https://arxiv.org/abs/1503.02531. The factor :math:`T^2`
    keeps the gradient at about the same size at all temperatures.
    MMDetection's ``KnowledgeDistillationKLDivLoss`` takes the mean over c
    in place of the sum.

    Args:
        pred: The student's logits, (..., C).
        target: The teacher's logits, (..., C); they get no gradient.
        temperature: T, above 0.

    Returns:
        The divergence of each sample in nats times :math:`T^2`, (...), at
        least 0 and 0 where both distributions are equal, float32.

    Raises:
        ConfigError: If the temperature is not above 0.
        ShapeError: If the shapes differ.

    Example:
        >>> import torch
        >>> from mmkd.losses import softmax_kl
        >>> softmax_kl(torch.zeros(2), torch.tensor([0.0, 100.0]))  # log 2
        tensor(0.6931)
    """
    check_positive('softmax_kl', temperature=temperature)
    check_same_shape('softmax_kl', REMEDY, pred=pred, target=target)
    ours = (pred.float() / temperature).log_softmax(-1)
    theirs = (target.detach().float() / temperature).log_softmax(-1)
    divergence = F.kl_div(ours, theirs, reduction='none', log_target=True)
    return divergence.sum(-1) * temperature**2


def sigmoid_kl(
    pred: Tensor, target: Tensor, temperature: float = 1.0
) -> Tensor:
    r"""Compute the divergence of independent binary problems, by element.

    .. math::
        T^2 \left(p_t \log\frac{p_t}{p_s}
        + (1 - p_t) \log\frac{1 - p_t}{1 - p_s}\right), \qquad
        p = \sigma(z / T)

    It is the binary cross-entropy with the teacher's probabilities minus its
    least value, so that equal networks have the loss 0.

    Source: as :func:`softmax_kl`, carried over to heads whose classes are
    binary problems, which the paper does not treat.

    Args:
        pred: The student's logits, any shape.
        target: The teacher's logits, same shape; they get no gradient.
        temperature: T, above 0.

    Returns:
        The divergence of each element in nats times :math:`T^2`, at least 0
        but for rounding, float32.

    Raises:
        ConfigError: If the temperature is not above 0.
        ShapeError: If the shapes differ.

    Example:
        >>> import torch
        >>> from mmkd.losses import sigmoid_kl
        >>> sigmoid_kl(torch.zeros(1), torch.tensor([100.0]))  # log 2
        tensor([0.6931])
    """
    check_positive('sigmoid_kl', temperature=temperature)
    check_same_shape('sigmoid_kl', REMEDY, pred=pred, target=target)
    ours, theirs = pred.float(), target.detach().float()
    if temperature == 1:
        return _SigmoidKL.apply(ours, theirs)
    divergence = _SigmoidKL.apply(ours / temperature, theirs / temperature)
    return divergence * temperature**2


class _KLLoss(PairLoss):
    """The options that both divergences have."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        reduction: str = 'mean',
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(reduction=reduction, loss_weight=loss_weight)
        check_positive(type(self).__name__, temperature=temperature)
        self.temperature = temperature


@MODELS.register_module()
class SoftmaxKLLoss(_KLLoss):
    """Weight and reduce :func:`softmax_kl`, which KD and LD use.

    Args:
        temperature: T, above 0.
        reduction: ``'none'``, ``'mean'`` or ``'sum'`` over the samples.
        loss_weight: Factor of the result.

    Raises:
        ConfigError: If an option is outside its range.

    Example:
        The distributions of four box sides over 17 bins, as in LD, which
        divides by the numbers of sides and bins. The student knows nothing,
        the teacher is sure of one bin: the loss is log(17) / 17.

        >>> import torch
        >>> from mmkd.losses import SoftmaxKLLoss
        >>> student, teacher = torch.zeros(1, 4, 17), torch.zeros(1, 4, 17)
        >>> teacher[..., 3] = 100
        >>> SoftmaxKLLoss()(student, teacher, avg_factor=4 * 17)
        tensor(0.1667)
    """

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        """Compare logits, (..., C), by sample, (...)."""
        return softmax_kl(pred, target, self.temperature)


@MODELS.register_module()
class SigmoidKLLoss(_KLLoss):
    """Weight and reduce :func:`sigmoid_kl`, which KD uses.

    Args:
        temperature: T, above 0.
        reduction: ``'none'``, ``'mean'`` or ``'sum'`` over the elements.
        loss_weight: Factor of the result.

    Raises:
        ConfigError: If an option is outside its range.

    Example:
        >>> import torch
        >>> from mmkd.losses import SigmoidKLLoss
        >>> student, teacher = torch.zeros(6, 80), torch.full((6, 80), 100.0)
        >>> SigmoidKLLoss()(student, teacher, avg_factor=6)  # 80 log 2
        tensor(55.4518)
    """

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        """Compare logits of any shape."""
        return sigmoid_kl(pred, target, self.temperature)


class _SigmoidKL(Function):
    """The divergence at temperature 1, in few passes over up to 10^7 logits.

    It is the difference of two cross-entropies, softplus(z) - p_t z; its
    gradient is p_s - p_t.
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
    r"""The binary problems of a network, for all that learn from it.

    K networks that learn from each other need K sigmoids, logarithms and
    products of their logits, not K (K - 1). Because of

    .. math::
        \frac{1}{n} \sum_b \mathrm{KL}(p_b \| p)
            = H\Bigl(\frac{1}{n} \sum_b p_b,\, p\Bigr)
              - \frac{1}{n} \sum_b H(p_b),

    with the cross-entropy H(q, p) and the entropy H(p), a network needs only
    the averages of the others' probabilities and entropies.

    Args:
        logits: The network's logits, (..., C).
        temperature: T, above 0.

    Raises:
        ConfigError: If the temperature is not above 0.

    Example:
        The student's probability is 1/2, the others' are 3/4 and 1/4.

        >>> import torch
        >>> from mmkd.losses import BinaryProblems
        >>> odds = torch.tensor([[1.0], [3.0], [1 / 3]])
        >>> student, *others = (BinaryProblems(z) for z in odds.log())
        >>> student.kl_from(others)  # 3/4 log(3/2) + 1/4 log(1/2)
        tensor(0.1308)
    """

    def __init__(self, logits: Tensor, temperature: float = 1.0) -> None:
        check_positive('BinaryProblems', temperature=temperature)
        self.temperature = temperature
        self.logits = logits.float()
        if temperature != 1:
            self.logits = self.logits / temperature
        fixed = self.logits.detach()
        self.probabilities = fixed.sigmoid()
        self.normaliser = F.softplus(fixed).sum(-1)
        self.entropy = self.normaliser - _dot(self.probabilities, fixed)

    def kl_from(self, targets: Sequence['BinaryProblems']) -> Tensor:
        """Compute the mean over targets of :func:`sigmoid_kl`, summed over C.

        Args:
            targets: At least one network; they get no gradient.

        Returns:
            The divergence of each sample in nats times T squared, (...),
            float32. Where all networks agree it is 0 up to rounding, which
            may leave it slightly negative.
        """
        first, *others = (target.probabilities for target in targets)
        mean = sum(others, first) / len(targets) if others else first
        first, *others = (target.entropy for target in targets)
        entropy = sum(others, first) / len(targets)
        cross = _CrossEntropy.apply(
            self.logits, self.probabilities, self.normaliser, mean
        )
        return (cross - entropy) * self.temperature**2


class _CrossEntropy(Function):
    """The cross-entropy sum_c softplus(z) - q z, with the gradient p - q."""

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
