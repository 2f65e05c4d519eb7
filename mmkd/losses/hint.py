"""Distance between a student's adapted feature and the teacher's."""

import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.registry import MODELS

from .reduction import check_reduction, reduce_loss

NORMS = ('l2', 'l1')


@MODELS.register_module()
class HintLoss(nn.Module):
    r"""Squared (or absolute) distance of features.

    .. math::
        L_{hint} = \frac{1}{n} \sum_i (V_i - Z_i)^2
        \quad\text{or}\quad \frac{1}{n} \sum_i |V_i - Z_i|

    with :math:`V` the student's feature behind its adaptation layer and
    :math:`Z` the teacher's.

    Source: Chen, Choi, Yu, Han, Chandraker, "Learning Efficient Object
    Detection Models with Knowledge Distillation", NeurIPS 2017, eq. 6, after
    Romero et al., "FitNets", ICLR 2015. The paper writes the squared norm;
    here it is the mean over elements, so that the weight does not depend on
    the size of the image.

    Args:
        norm: ``'l2'`` for squared, ``'l1'`` for absolute differences.
        reduction: ``'none'``, ``'mean'`` or ``'sum'``.
        loss_weight: Factor of the result.

    Raises:
        ValueError: If an option is outside its range.

    Example:
        >>> HintLoss()(torch.full((1, 2, 4, 4), 3.0), torch.ones(1, 2, 4, 4))
        tensor(4.)
    """

    def __init__(
        self,
        *,
        norm: str = 'l2',
        reduction: str = 'mean',
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f'norm must be one of {NORMS}, got {norm!r}')
        self.norm = norm
        self.reduction = check_reduction(reduction)
        self.loss_weight = loss_weight

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Compare two features of the same shape.

        Args:
            pred: The student's adapted feature, (B, C, H, W) or (N, C).
            target: The teacher's feature, same shape; gets no gradient.
            weight: Weight of each element, broadcast to ``pred``.
            avg_factor: Divides the sum instead of the number of elements.
            reduction_override: Replaces the configured reduction.

        Returns:
            A scalar, or the shape of ``pred`` without reduction.
        """
        if pred.shape != target.shape:
            raise ValueError(
                'student and teacher features must have the same shape, got '
                f'{tuple(pred.shape)} and {tuple(target.shape)}: adapt the '
                'width and resize the map first'
            )
        reduction = check_reduction(reduction_override or self.reduction)
        distance = F.mse_loss if self.norm == 'l2' else F.l1_loss
        loss = distance(
            pred.float(), target.detach().float(), reduction='none'
        )
        return self.loss_weight * reduce_loss(
            loss, weight, avg_factor, reduction
        )
