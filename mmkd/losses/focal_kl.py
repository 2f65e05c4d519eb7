"""Soft labels whose easy samples weigh less."""

from torch import Tensor, nn

from mmkd.errors import ConfigError
from mmkd.registry import MODELS

from .kl import sigmoid_kl
from .reduction import check_reduction, reduce_loss


@MODELS.register_module()
class FocalKLLoss(nn.Module):
    r"""KL divergence of Bernoulli distributions, focused on what differs.

    .. math::
        L = \left(|p_t - p_s|^2 + 10^{-6}\right)^{\gamma / 2}
            \left(p_t \log \frac{p_t}{p_s}
                  + (1 - p_t) \log \frac{1 - p_t}{1 - p_s}\right)

    with :math:`p = \sigma(z)`, for each entry. The gradient flows through
    the focusing factor, too.

    Source: Nguyen et al., "Improving Object Detection by Label Assignment
    Distillation", WACV 2022 (SoLAD), with the smoothing 1e-6 of its official
    code.

    Args:
        gamma: Exponent of the focusing factor, at least 0.
        reduction: ``'none'``, ``'mean'`` or ``'sum'``.
        loss_weight: Factor of the result.

    Raises:
        ConfigError: If an option is outside its range.
    """

    def __init__(
        self,
        *,
        gamma: float = 0.5,
        reduction: str = 'mean',
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if gamma < 0:
            raise ConfigError(
                f'FocalKLLoss.gamma must be at least 0, got {gamma}'
            )
        self.gamma, self.loss_weight = gamma, loss_weight
        self.reduction = check_reduction(reduction)

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """The loss between two sets of logits.

        Args:
            pred: The student's logits, any shape.
            target: The teacher's logits, same shape; no gradient flows to
                them.
            weight: Weights that broadcast to the shape.
            avg_factor: Divides the sum, instead of the number of entries.
            reduction_override: Takes the place of ``reduction``.
        """
        p, p_t = pred.float().sigmoid(), target.detach().float().sigmoid()
        focus = ((p_t - p) ** 2 + 1e-6) ** (self.gamma / 2)
        loss = focus * sigmoid_kl(pred, target)
        return self.loss_weight * reduce_loss(
            loss, weight, avg_factor, reduction_override or self.reduction
        )
