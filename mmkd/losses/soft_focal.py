"""Quality focal loss towards soft targets (Wang et al., CVPR 2024)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.registry import MODELS

from .checks import check_not_negative, check_same_shape
from .reduction import PairLoss


def soft_focal_loss(
    pred: Tensor, target: Tensor, *, beta: float = 1.0
) -> Tensor:
    r"""Compute the binary cross-entropy with soft targets, focused.

    .. math::
        L = |\sigma(z) - p_t|^{\beta} \left(
            -p_t \log \sigma(z) - (1 - p_t) \log (1 - \sigma(z)) \right)

    The gradient flows through the focusing factor as well.

    Source: Li et al., "Generalized Focal Loss", NeurIPS 2020,
    https://arxiv.org/abs/2006.04388, with :math:`\beta = 2` and the
    IoU as the target; Wang, Chen, Cai, Wang, Lin, Cheng, "CrossKD: Cross-Head
    Knowledge Distillation for Dense Object Detection", CVPR 2024,
    https://arxiv.org/abs/2306.11369, with :math:`\beta = 1` and the teacher's
    probabilities. The official code of CrossKD is given the teacher's logits
    and takes their sigmoid.

    Args:
        pred: The student's logits, any shape.
        target: The teacher's *probabilities*, same shape; they get no
            gradient.
        beta: Exponent of the focusing factor, at least 0. With 0 the loss is
            the binary cross-entropy.

    Returns:
        The loss of each element in nats, at least 0, float32. With ``beta``
        above 0 it is 0 where the student meets the target.

    Raises:
        ConfigError: If ``beta`` is below 0.
        ShapeError: If the shapes differ.

    Example:
        >>> import torch
        >>> from mmkd.losses import soft_focal_loss
        >>> soft_focal_loss(torch.zeros(1), torch.tensor([0.75]))  # log(2) / 4
        tensor([0.1733])
    """
    check_not_negative('soft_focal_loss', beta=beta)
    remedy = 'Select the classes that both networks have first.'
    check_same_shape('soft_focal_loss', remedy, pred=pred, target=target)
    pred, target = pred.float(), target.detach().float()
    entropy = F.binary_cross_entropy_with_logits(
        pred, target, reduction='none'
    )
    difference = (pred.sigmoid() - target).abs()
    if 0 < beta < 1:  # the gradient of the power is infinite at 0
        difference = difference.clamp(min=torch.finfo(torch.float32).tiny)
    return difference.pow(beta) * entropy


@MODELS.register_module()
class SoftFocalLoss(PairLoss):
    """Weight and reduce :func:`soft_focal_loss`, which CrossKD uses.

    Args:
        beta: Exponent of the focusing factor, at least 0.
        reduction: ``'none'``, ``'mean'`` or ``'sum'``.
        loss_weight: Factor of the result.

    Raises:
        ConfigError: If an option is outside its range.

    Example:
        >>> import torch
        >>> from mmkd.losses import SoftFocalLoss
        >>> student, teacher = torch.zeros(6, 80), torch.full((6, 80), 0.75)
        >>> SoftFocalLoss()(student, teacher, avg_factor=6)  # 80 log(2) / 4
        tensor(13.8629)
    """

    def __init__(
        self,
        *,
        beta: float = 1.0,
        reduction: str = 'mean',
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(reduction=reduction, loss_weight=loss_weight)
        check_not_negative('SoftFocalLoss', beta=beta)
        self.beta = beta

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        """Compare logits, of any shape, with the teacher's probabilities."""
        return soft_focal_loss(pred, target, beta=self.beta)
