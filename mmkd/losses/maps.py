"""Statistics of feature maps whose padding does not count."""

import torch
from torch import Tensor

OUTSIDE = -1e30
"""A logit for padding: its softmax is 0, and differences of it are finite."""
FLAT = 1e-5
"""A channel whose deviation is a smaller part of its mean is constant, apart
from rounding."""

AT_ONCE = 2**18
"""How many numbers of a map are compared at once on a CPU, whose cache holds
what is computed from them."""


def channels_at_once(maps: Tensor) -> int:
    """Return how many channels of maps (B, C, H, W) are compared at once."""
    images, channels, height, width = maps.shape
    if maps.device.type != 'cpu':
        return max(channels, 1)
    return max(AT_ONCE // max(images * height * width, 1), 1)


def full_weights(maps: Tensor) -> Tensor:
    """Return the weights of the positions of maps without padding.

    Args:
        maps: (B, C, H, W).

    Returns:
        (B, 1, H, W), 1 / (H W) everywhere, float32.
    """
    images, _, height, width = maps.shape
    return maps.new_full(
        (images, 1, height, width), 1 / (height * width), dtype=torch.float32
    )


def standardize(
    maps: Tensor, weights: Tensor, *, per_image: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Give every channel mean 0 and variance 1 over its positions.

    A channel that is constant, apart from rounding, becomes 0 and gets no
    gradient.

    Args:
        maps: (B, C, H, W).
        weights: (B, 1, H, W), 1/n on the n positions of an image and 0 on its
            padding.
        per_image: Take the statistics over each image's positions, in place
            of those of the whole batch, which all count alike.
        eps: What the variance is increased by.

    Returns:
        The maps in float32, and the weights (B, 1, H, W) by which they were
        averaged: 0 on padding, with the sum 1 over the batch or each image.

    Example:
        >>> import torch
        >>> from mmkd.losses.maps import full_weights, standardize
        >>> maps = torch.tensor([[[[1.0, 3.0]]]])
        >>> standardize(maps, full_weights(maps), per_image=True, eps=0.0)[0]
        tensor([[[[-1.,  1.]]]])
    """
    over: tuple[int, ...] = (2, 3)
    if not per_image:
        over = (0, 2, 3)
        inside = (weights > 0).float()
        weights = inside / inside.sum()
    maps = maps.float()
    mean = (maps * weights).sum(over, keepdim=True)
    centred = maps - mean
    variance = (centred.square() * weights).sum(over, keepdim=True)
    scale = (variance + eps).rsqrt()
    scale = scale.where(variance > FLAT**2 * mean.square(), 0.0)
    return centred * scale, weights
