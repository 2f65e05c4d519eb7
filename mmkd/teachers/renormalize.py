"""Converts the student's pixels to those that another network expects."""

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.structures import DetDataSample
from torch import Tensor

from mmkd.detectors.blank import image_channels
from mmkd.detectors.pixels import flips, mean_std, pad_value
from mmkd.errors import ConfigError


class Renormalize:
    """Turns the student's normalised batch into the teacher's.

    It undoes the student's mean, standard deviation and channel order, and
    applies the teacher's. Padding becomes the teacher's padding.

    Args:
        student: The student's data preprocessor.
        teacher: The teacher's data preprocessor.

    Attributes:
        needed: Whether the two differ at all.
    """

    def __init__(self, student: Any, teacher: Any) -> None:
        mean_s, std_s, mean_t, std_t = torch.broadcast_tensors(
            *mean_std(student), *mean_std(teacher)
        )
        self.flip = flips(student) != flips(teacher)
        if self.flip:
            mean_s, std_s = mean_s.flip(0), std_s.flip(0)
        # x_t = (x_s * std_s + mean_s - mean_t) / std_t
        self.scale = (std_s / std_t).view(1, -1, 1, 1)
        self.shift = ((mean_s - mean_t) / std_t).view(1, -1, 1, 1)
        self.pad_value = pad_value(teacher)
        self.needed = bool(
            self.flip
            or not torch.equal(mean_s, mean_t)
            or not torch.equal(std_s, std_t)
            or self.pad_value != pad_value(student)
        )

    def __call__(
        self, inputs: Tensor, data_samples: Sequence[DetDataSample]
    ) -> Tensor:
        """Convert a batch (B, C, H, W), or return it if nothing differs."""
        if not self.needed:
            return inputs
        if self.flip:
            inputs = inputs.flip(1)
        self.scale = self.scale.to(inputs.device)
        self.shift = self.shift.to(inputs.device)
        result = inputs * self.scale + self.shift
        for image, sample in zip(result, data_samples, strict=True):
            height, width = sample.img_shape[:2]
            image[:, height:] = self.pad_value
            image[:, :, width:] = self.pad_value
        return result


def check_channels(student: Any, other: Any, where: str) -> None:
    """Check that two detectors read images of as many channels.

    Args:
        student: The student's detector.
        other: A teacher's or a peer's.
        where: The place of its description in the config.

    Raises:
        ConfigError: If they do not, because there is no pixel for a channel
            that the student's batch lacks.
    """
    ours, theirs = image_channels(student), image_channels(other)
    if ours != theirs:
        raise ConfigError(
            f'{where}: its {type(other).__name__} reads images of {theirs} '
            f'channels, the student of {ours}, and both see the same batch. '
            'Take a network that was trained on such images, or let the '
            f'student read images of {theirs} channels (color_type of '
            'LoadImageFromFile, in_channels of its backbone, mean and std of '
            'its data_preprocessor).'
        )
