"""Cosine distance between a student's feature and the teacher's."""

import torch.nn.functional as F
from torch import Tensor

from mmkd.registry import MODELS

from .checks import check_same_shape
from .reduction import PairLoss


def cosine_loss(pred: Tensor, target: Tensor) -> Tensor:
    r"""Compute one minus the cosine of the angle between two features.

    .. math::
        L = 1 - \frac{\langle s, t \rangle}{\|s\| \, \|t\|}

    of the vectors s and t along the second axis. Only directions count, not
    lengths. A vector of zeros has the loss 1.

    Source: Liao, Zhao, Shan, Yan, Liu, Lu, Ji, Chen, "RT-DETRv4: Painlessly
    Furthering Real-Time Object Detection with Vision Foundation Models",
    arXiv 2025, https://arxiv.org/abs/2510.25257.

    Args:
        pred: The student's feature, (B, C, H, W) or (N, C).
        target: The teacher's feature, same shape; it gets no gradient.

    Returns:
        The distance at each position, (B, H, W) or (N,), from 0 to 2, without
        unit, float32.

    Raises:
        ShapeError: If the shapes differ.

    Example:
        >>> import torch
        >>> from mmkd.losses import cosine_loss
        >>> student = torch.tensor([[3.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
        >>> cosine_loss(student, torch.tensor([[5.0, 0.0]]).expand(3, 2))
        tensor([0.0000, 0.4000, 1.0000])
    """
    check_same_shape(
        'cosine_loss',
        'Adapt the width and resize the map first.',
        pred=pred,
        target=target,
    )
    return 1 - F.cosine_similarity(pred.float(), target.detach().float())


@MODELS.register_module()
class CosineLoss(PairLoss):
    """Weight and reduce :func:`cosine_loss`, which FoundationFeatures uses.

    Args:
        reduction: ``'none'``, ``'mean'`` or ``'sum'``.
        loss_weight: Factor of the result.

    Raises:
        ConfigError: If the reduction is unknown.

    Example:
        >>> import torch
        >>> from mmkd.losses import CosineLoss
        >>> CosineLoss()(torch.ones(1, 2, 4, 4), -torch.ones(1, 2, 4, 4))
        tensor(2.)
    """

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        """Compare features, (B, C, H, W) or (N, C)."""
        return cosine_loss(pred, target)
