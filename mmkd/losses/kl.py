"""Kullback-Leibler divergences of a teacher's and a student's logits."""

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
    ours = student.float() / temperature
    theirs = teacher.detach().float() / temperature
    # log p = logsigmoid(z), log (1 - p) = logsigmoid(-z)
    positive = F.logsigmoid(theirs) - F.logsigmoid(ours)
    negative = F.logsigmoid(-theirs) - F.logsigmoid(-ours)
    divergence = theirs.sigmoid() * positive + (-theirs).sigmoid() * negative
    return divergence * temperature**2
