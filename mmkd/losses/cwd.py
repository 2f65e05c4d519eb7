"""Channel-wise divergence of feature maps (Shu et al., ICCV 2021)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mmkd.registry import MODELS

from .checks import check_axes, check_positive, check_same_shape
from .maps import OUTSIDE, channels_at_once
from .reduction import Loss


def cwd_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    r"""Compute the divergence of maps' channels as distributions in space.

    .. math::
        L_c = T^2 \sum_{i=1}^{H W}
            \phi(F^t_{c,i}) \log \frac{\phi(F^t_{c,i})}{\phi(F^s_{c,i})},
        \qquad
        \phi(F_{c,i}) = \frac{\exp(F_{c,i} / T)}{\sum_j \exp(F_{c,j} / T)}

    The distributions say where a channel is active, whatever its mean is.

    Source: Shu, Liu, Gao, Yan, Shen, "Channel-wise Knowledge Distillation for
    Dense Prediction", ICCV 2021, https://arxiv.org/abs/2011.13256, sec. 3.
    The official code and MMRazor compute the same; neither leaves the
    padding of the images out of the distributions.

    Args:
        pred: The student's maps, (B, C, H, W), as wide as the teacher's.
        target: The teacher's maps, same shape; they get no gradient.
        weight: (B, 1, H, W), 0 on padding, which is left out, and above 0 on
            the images. By default there is no padding.
        temperature: T, above 0; softens the distributions.

    Returns:
        The divergence of each channel of each image in nats times
        :math:`T^2`, (B, C), at least 0 but for rounding, float32.

    Raises:
        ConfigError: If the temperature is not above 0.
        ShapeError: If the maps have other axes or differ in shape.

    Example:
        The student's channel is equally active at both positions, the
        teacher's three times as likely at the first.

        >>> import torch
        >>> from mmkd.losses import cwd_loss
        >>> student = torch.ones(1, 1, 1, 2)
        >>> teacher = torch.tensor([[[[3.0, 1.0]]]]).log()
        >>> cwd_loss(student, teacher)  # 3/4 log(3/2) + 1/4 log(1/2)
        tensor([[0.1308]])
    """
    check_positive('cwd_loss', temperature=temperature)
    check_axes('cwd_loss', pred, 'B C H W')
    remedy = 'Adapt the width and resize the map first.'
    check_same_shape('cwd_loss', remedy, pred=pred, target=target)
    limit = None
    if weight is not None:
        limit = torch.full_like(weight, torch.inf, dtype=torch.float32)
        limit = limit.masked_fill(weight == 0, OUTSIDE).flatten(2)
    ours, theirs = pred.float(), target.detach().float()
    return _ChannelKL.apply(ours, theirs, limit, temperature)


class _ChannelKL(Function):
    """The divergence in few passes over maps of up to 10^7 numbers.

    Its gradient is T (p_s - p_t), which is all that is kept. No share is an
    argument of a logarithm but the largest one, which cannot be 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ours: Tensor,
        theirs: Tensor,
        limit: Tensor | None,
        temperature: float,
    ) -> Tensor:
        images, channels, height, width = ours.shape
        at_once = channels_at_once(ours)
        kept = ours.new_empty(images, channels, height * width)
        divergences = []
        for maps_s, maps_t, difference in zip(
            *(maps.flatten(2).split(at_once, 1) for maps in (ours, theirs)),
            kept.split(at_once, 1),
            strict=True,
        ):
            logits_s, logits_t = (
                _logits(maps, limit, temperature) for maps in (maps_s, maps_t)
            )
            shares_s, shares_t = logits_s.softmax(-1), logits_t.softmax(-1)
            torch.sub(shares_s, shares_t, out=difference)
            # log p = z - max z + log max p
            rise = logits_t.amax(-1) - logits_s.amax(-1)
            gain = shares_t.amax(-1).log() - shares_s.amax(-1).log()
            ratio = (logits_t - logits_s).sub_(rise[..., None])
            divergences.append(ratio.mul_(shares_t).sum(-1) + gain)
        ctx.save_for_backward(kept.view(ours.shape))
        ctx.temperature = temperature
        return torch.cat(divergences, dim=1).mul_(temperature**2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (difference,) = ctx.saved_tensors
        scale = gradient * ctx.temperature
        return difference * scale[..., None, None], None, None, None


def _logits(maps: Tensor, limit: Tensor | None, temperature: float) -> Tensor:
    """Divide by the temperature and give padding very low logits.

    Args:
        maps: (B, C, N).
        limit: The highest logits (B, 1, N), very low ones on padding. It is
            faster to compare with them than to select by a mask.
        temperature: T.
    """
    if temperature != 1:
        maps = maps / temperature
    return maps if limit is None else torch.minimum(maps, limit)


@MODELS.register_module()
class CWDLoss(Loss):
    """Weight and reduce :func:`cwd_loss`, which CWD uses.

    Args:
        temperature: T, above 0; softens the distributions.
        reduction: ``'none'``, ``'mean'`` or ``'sum'`` over the channels and
            images.
        loss_weight: Factor of the result.

    Raises:
        ConfigError: If an option is outside its range.

    Example:
        >>> import torch
        >>> from mmkd.losses import CWDLoss
        >>> student = torch.ones(2, 8, 1, 2)
        >>> teacher = torch.tensor([3.0, 1.0]).log().expand(2, 8, 1, 2)
        >>> CWDLoss(loss_weight=10.0)(student, teacher)
        tensor(1.3081)
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        reduction: str = 'mean',
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(reduction=reduction, loss_weight=loss_weight)
        check_positive('CWDLoss', temperature=temperature)
        self.temperature = temperature

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
            weight: (B, 1, H, W), 0 on padding and above 0 on the images.
            avg_factor: Divides the sum, in place of B C.
            reduction_override: Replaces the configured reduction.

        Returns:
            A scalar, or (B, C) without reduction.
        """
        loss = cwd_loss(pred, target, weight, temperature=self.temperature)
        return self.reduce(loss, None, avg_factor, reduction_override)
