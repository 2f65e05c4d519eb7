"""Distance between a student's adapted feature and the teacher's."""

import torch.nn.functional as F
from torch import Tensor

from mmkd.registry import MODELS

from .checks import check_choice, check_same_shape
from .reduction import PairLoss

NORMS = ('l2', 'l1')


def hint_loss(pred: Tensor, target: Tensor, *, norm: str = 'l2') -> Tensor:
    r"""Compute the squared or absolute distance of two features.

    .. math::
        L_i = (V_i - Z_i)^2 \quad\text{or}\quad L_i = |V_i - Z_i|

    with :math:`V` the student's feature behind its adaptation layer and
    :math:`Z` the teacher's.

    Source: Chen, Choi, Yu, Han, Chandraker, "Learning Efficient Object
    Detection Models with Knowledge Distillation", NeurIPS 2017, eq. 6, after
    Romero et al., "FitNets", ICLR 2015, https://arxiv.org/abs/1412.6550. The
    papers write the squared norm, a sum over the elements; :class:`HintLoss`
    takes their mean by default, so that its weight does not depend on the
    size of the image.

    Args:
        pred: The student's adapted feature, any shape.
        target: The teacher's feature, same shape; it gets no gradient.
        norm: ``'l2'`` for squared, ``'l1'`` for absolute differences.

    Returns:
        The distance of each element in the feature's units (squared for
        ``'l2'``), float32.

    Raises:
        ConfigError: If the norm is unknown.
        ShapeError: If the shapes differ.

    Example:
        >>> import torch
        >>> from mmkd.losses import hint_loss
        >>> student, teacher = torch.tensor([3.0, 1.0]), torch.zeros(2)
        >>> hint_loss(student, teacher)
        tensor([9., 1.])
        >>> hint_loss(student, teacher, norm='l1')
        tensor([3., 1.])
    """
    check_choice('hint_loss', NORMS, norm=norm)
    check_same_shape(
        'hint_loss',
        'Adapt the width and resize the map first.',
        pred=pred,
        target=target,
    )
    distance = F.mse_loss if norm == 'l2' else F.l1_loss
    return distance(pred.float(), target.detach().float(), reduction='none')


@MODELS.register_module()
class HintLoss(PairLoss):
    """Weight and reduce :func:`hint_loss`, which FeatureHint uses.

    Args:
        norm: ``'l2'`` for squared, ``'l1'`` for absolute differences.
        reduction: ``'none'``, ``'mean'`` or ``'sum'``.
        loss_weight: Factor of the result.

    Raises:
        ConfigError: If an option is outside its range.

    Example:
        >>> import torch
        >>> from mmkd.losses import HintLoss
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
        super().__init__(reduction=reduction, loss_weight=loss_weight)
        check_choice('HintLoss', NORMS, norm=norm)
        self.norm = norm

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        """Compare features, (B, C, H, W) or (N, C)."""
        return hint_loss(pred, target, norm=self.norm)
