"""How a detector's data preprocessor treats the pixels of an image."""

from typing import Any

import torch
from torch import Tensor


def mean_std(preprocessor: Any) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation, one for each channel.

    A single value is that of every channel; without normalisation they are 0
    and 1.
    """
    if not getattr(preprocessor, '_enable_normalize', False):
        return torch.zeros(1), torch.ones(1)
    mean, std = (
        value.detach().cpu().float().flatten()
        for value in (preprocessor.mean, preprocessor.std)
    )
    return mean, std


def flips(preprocessor: Any) -> bool:
    """Return whether it reverses the order of the channels."""
    return bool(getattr(preprocessor, '_channel_conversion', False))


def pad_value(preprocessor: Any) -> float:
    """Return the value of the padding."""
    return float(getattr(preprocessor, 'pad_value', 0))
