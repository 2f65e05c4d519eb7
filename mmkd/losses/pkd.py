"""Anticorrelation of feature maps (Cao et al., NeurIPS 2022)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mmkd.registry import MODELS

from .checks import check_axes, check_same_shape
from .maps import FLAT, channels_at_once, full_weights
from .reduction import Loss

EPSILON = 1e-12
"""Added to variances; channels that are constant learn nothing anyway."""


def pkd_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    per_image: bool = False,
) -> Tensor:
    r"""Compute one minus the Pearson correlation of two maps' channels.

    .. math::
        L_c = 1 - r_c = \frac{1}{2} \, \overline{(\hat F^s_c - \hat F^t_c)^2},
        \qquad
        \hat F_c = \frac{F_c - \mu_c}{\sigma_c}

    The mean, the deviation and the average are those over the positions of
    all images of the batch, or of each image with ``per_image``. Only the
    pattern counts, not its scale. A channel that is constant in one of the
    maps has the loss 1/2 and no gradient.

    Source: Cao, Zhang, Gao, Cheng, Cheng, Zhang, "PKD: General Distillation
    Framework for Object Detectors via Pearson Correlation Coefficient",
    NeurIPS 2022, https://arxiv.org/abs/2207.02039. The official code
    (MMRazor) takes the unbiased deviation, which makes the loss smaller by
    the factor :math:`1 - 1 / (B H W)`, and counts the padding of the images.

    Args:
        pred: The student's maps, (B, C, H, W), as wide as the teacher's.
        target: The teacher's maps, same shape; they get no gradient.
        weight: (B, 1, H, W), 1/n on the n positions of an image and 0 on its
            padding. By default there is no padding.
        per_image: Correlate within each image in place of over the batch.

    Returns:
        The distance of each channel, from 0 to 2, without unit: (C,), or
        (B, C) with ``per_image``, float32.

    Raises:
        ShapeError: If the maps have other axes or differ in shape.

    Example:
        The correlation of (0, 1, 2) and (0, 20, 10) is 1/2.

        >>> import torch
        >>> from mmkd.losses import pkd_loss
        >>> student = torch.tensor([[[[0.0, 1.0, 2.0]]]])
        >>> teacher = torch.tensor([[[[0.0, 20.0, 10.0]]]])
        >>> pkd_loss(student, teacher)
        tensor([0.5000])
    """
    check_axes('pkd_loss', pred, 'B C H W')
    remedy = 'Adapt the width and resize the map first.'
    check_same_shape('pkd_loss', remedy, pred=pred, target=target)
    weights = full_weights(pred) if weight is None else weight.float()
    if not per_image:
        weights = (weights > 0).float()
        weights = weights / weights.sum()
    ours, theirs = pred.float(), target.detach().float()
    loss = _Anticorrelation.apply(ours, theirs, weights, per_image)
    return loss if per_image else loss[0]


class _Anticorrelation(Function):
    r"""Half the squared distance of standardised maps, in few passes.

    Its gradient, which is all that is kept, is :math:`w_i / \sigma_s` times
    :math:`r \hat F^s_i - \hat F^t_i`, apart from epsilon.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ours: Tensor,
        theirs: Tensor,
        weights: Tensor,
        per_image: bool,
    ) -> Tensor:
        images, channels, height, width = ours.shape
        at_once = channels_at_once(ours)
        over = (2,) if per_image else (0, 2)
        weights = weights.flatten(2)
        kept = ours.new_empty(images, channels, height * width)
        losses = []
        for maps_s, maps_t, gradient in zip(
            *(maps.flatten(2).split(at_once, 1) for maps in (ours, theirs)),
            kept.split(at_once, 1),
            strict=True,
        ):
            (normal_s, scale, square_s), (normal_t, _, square_t) = (
                _standardized(maps, weights, over) for maps in (maps_s, maps_t)
            )
            apart = normal_s - normal_t
            squares = apart.square().mul_(weights).sum(over, keepdim=True)
            losses.append(squares[..., 0] / 2)
            correlation = (square_s + square_t - squares) / 2
            rest = 1 - correlation - EPSILON * scale.square()
            torch.mul(
                apart.sub_(normal_s.mul_(rest)).mul_(scale),
                weights,
                out=gradient,
            )
        ctx.save_for_backward(kept.view(ours.shape))
        return torch.cat(losses, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return kept * gradient[..., None, None], None, None, None


def _standardized(
    maps: Tensor, weights: Tensor, over: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Give every channel mean 0 and variance 1 over its positions.

    Args:
        maps: (B, C, N).
        weights: (B, 1, N), with the sum 1 over the averaged axes.
        over: The axes that are averaged.

    Returns:
        The maps, by what their deviations were multiplied, and their squares'
        mean. A channel that is constant, apart from rounding, becomes 0.
    """
    mean = (maps * weights).sum(over, keepdim=True)
    centred = maps - mean
    variance = centred.square().mul_(weights).sum(over, keepdim=True)
    scale = (variance + EPSILON).rsqrt()
    scale = scale.where(variance > FLAT**2 * mean.square(), 0.0)
    return centred.mul_(scale), scale, variance * scale.square()


@MODELS.register_module()
class PKDLoss(Loss):
    """Weight and reduce :func:`pkd_loss`, which PKD uses.

    Args:
        per_image: Correlate within each image in place of over the batch.
        reduction: ``'none'``, ``'mean'`` or ``'sum'`` over the channels (and
            the images with ``per_image``).
        loss_weight: Factor of the result.

    Raises:
        ConfigError: If the reduction is unknown.

    Example:
        >>> import torch
        >>> from mmkd.losses import PKDLoss
        >>> student = torch.tensor([[[[0.0, 1.0, 2.0]]]])
        >>> teacher = torch.tensor([[[[0.0, 20.0, 10.0]]]])
        >>> PKDLoss(loss_weight=6.0)(student, teacher)  # 6 (1 - 1/2)
        tensor(3.0000)
    """

    def __init__(
        self,
        *,
        per_image: bool = False,
        reduction: str = 'mean',
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(reduction=reduction, loss_weight=loss_weight)
        self.per_image = per_image

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Compare the channels of two maps.

        Args:
            pred: The student's maps, (B, C, H, W).
            target: The teacher's maps, same shape; they get no gradient.
            weight: (B, 1, H, W), 1/n on the n positions of an image and 0 on
                its padding.
            avg_factor: Divides the sum, in place of the number of channels
                (times images with ``per_image``).
            reduction_override: Replaces the configured reduction.

        Returns:
            A scalar; without reduction (C,), or (B, C) with ``per_image``.
        """
        loss = pkd_loss(pred, target, weight, per_image=self.per_image)
        return self.reduce(loss, None, avg_factor, reduction_override)
