"""Divergence from soft labels that focuses on where the networks differ."""

from torch import Tensor

from mmkd.registry import MODELS

from .checks import check_not_negative
from .kl import sigmoid_kl
from .reduction import PairLoss


def focal_kl_loss(
    pred: Tensor, target: Tensor, *, gamma: float = 0.5
) -> Tensor:
    r"""Compute the divergence of binary problems, focused on differences.

    .. math::
        L = \left(|p_t - p_s|^2 + 10^{-6}\right)^{\gamma / 2}
            \left(p_t \log \frac{p_t}{p_s}
                  + (1 - p_t) \log \frac{1 - p_t}{1 - p_s}\right), \qquad
        p = \sigma(z)

    The gradient flows through the focusing factor as well.

    Source: Nguyen et al., "Improving Object Detection by Label Assignment
    Distillation", WACV 2022, https://arxiv.org/abs/2108.10520 (SoLAD). The
    paper has no :math:`10^{-6}`; it comes from the official code, and keeps
    the gradient finite where both networks agree.

    Args:
        pred: The student's logits, any shape.
        target: The teacher's logits, same shape; they get no gradient.
        gamma: Exponent of the focusing factor, at least 0. With 0 the loss is
            :func:`~mmkd.losses.sigmoid_kl`.

    Returns:
        The loss of each element in nats, at least 0, float32.

    Raises:
        ConfigError: If ``gamma`` is below 0.
        ShapeError: If the shapes differ.

    Example:
        The probabilities are 1/2 and 3/4, so that the factor is 1/4 and the
        divergence is 3/4 log(3/2) + 1/4 log(1/2).

        >>> import torch
        >>> from mmkd.losses import focal_kl_loss
        >>> student, teacher = torch.zeros(1), torch.tensor([3.0]).log()
        >>> focal_kl_loss(student, teacher, gamma=1)
        tensor([0.0327])
    """
    check_not_negative('focal_kl_loss', gamma=gamma)
    divergence = sigmoid_kl(pred, target)
    p, p_t = pred.float().sigmoid(), target.detach().float().sigmoid()
    focus = ((p_t - p) ** 2 + 1e-6) ** (gamma / 2)
    return focus * divergence


@MODELS.register_module()
class FocalKLLoss(PairLoss):
    """Weight and reduce :func:`focal_kl_loss`, which SoLAD uses.

    Args:
        gamma: Exponent of the focusing factor, at least 0.
        reduction: ``'none'``, ``'mean'`` or ``'sum'``.
        loss_weight: Factor of the result.

    Raises:
        ConfigError: If an option is outside its range.

    Example:
        >>> import torch
        >>> from mmkd.losses import FocalKLLoss
        >>> loss = FocalKLLoss(gamma=1.0, loss_weight=10.0)
        >>> loss(torch.zeros(4, 80), torch.full((4, 80), 3.0).log())
        tensor(0.3270)
    """

    def __init__(
        self,
        *,
        gamma: float = 0.5,
        reduction: str = 'mean',
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(reduction=reduction, loss_weight=loss_weight)
        check_not_negative('FocalKLLoss', gamma=gamma)
        self.gamma = gamma

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        """Compare logits of any shape."""
        return focal_kl_loss(pred, target, gamma=self.gamma)
