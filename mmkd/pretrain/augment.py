"""SimCLR's augmentations, by kornia on tensors."""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.errors import ConfigError, PackageError

RATIO = (3 / 4, 4 / 3)
"""Width to height of what is cut out."""
SIGMA = (0.1, 2.0)
"""Of the blur, in pixels of the crop."""


def check_kornia() -> None:
    """Raise :class:`PackageError` if kornia is not installed."""
    if find_spec('kornia') is None:
        raise PackageError(
            "mmkd pretrain needs kornia: pip install 'mmkd[pretrain]'"
        )


def check_crops(size: int, scale: tuple[float, float]) -> None:
    """Check the options of :func:`random_crops`.

    Raises:
        ConfigError: If one is outside its range.
    """
    if size < 32:
        raise ConfigError(
            f'--size must be at least 32 pixels, which is the stride of the '
            f'last level of most backbones, got {size}.'
        )
    low, high = scale
    if not 0 < low <= high <= 1:
        raise ConfigError(
            '--crop-scale must be two parts of the area of an image, 0 < MIN '
            f'<= MAX <= 1, got {low:g} {high:g}.'
        )


def random_crops(
    picture: Tensor, count: int, size: int, scale: tuple[float, float]
) -> Tensor:
    """Cut out parts of a picture at random, and resize them to a square.

    The parts are those of kornia's ``RandomResizedCrop``, with sides in a
    ratio from 3:4 to 4:3. They are resized with antialiasing, as torchvision
    does; SimCLR's official code resizes by cubic interpolation without.

    Args:
        picture: (3, H, W), uint8.
        count: The number of crops.
        size: The sides of the result, in pixels.
        scale: The least and the largest part of the area that is cut out.

    Returns:
        (count, 3, size, size), uint8. Small pictures are enlarged.
    """
    from kornia.augmentation.random_generator import ResizedCropGenerator

    draw = ResizedCropGenerator((size, size), scale, RATIO)
    corners = draw((count, *picture.shape))['src'].long()
    crops = []
    # corners: upper left, upper right, lower right, lower left, all within
    for (left, top), _, (right, bottom), _ in corners.tolist():
        part = picture[None, :, top : bottom + 1, left : right + 1]
        crops.append(
            F.interpolate(part, (size, size), mode='bilinear', antialias=True)
        )
    return torch.cat(crops)


class Distortion:
    """Flip, change the colours, and blur, each at random.

    In SimCLR's order: a horizontal flip (p = .5), brightness, contrast,
    saturation and hue by up to .8, .8, .8 and .2 times the strength (p = .8),
    grey (p = .2), a Gaussian blur with a kernel of a tenth of the side (p).
    Each image draws its own numbers from PyTorch's global generator; the order
    of the four changes of colour is drawn once for a batch.

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual
    Representations", ICML 2020, appendix A, and the official code
    (google-research/simclr, ``tf2/data_util.py``).

    Args:
        size: The sides of the images, in pixels.
        strength: Of the changes of colour; 1 on ImageNet, .5 on CIFAR-10.
        blur: The probability of a blur; .5 on ImageNet, 0 on CIFAR-10.

    Raises:
        ConfigError: If an option is outside its range.
        PackageError: If kornia is not installed.
    """

    not_resumed = ('steps',)  # what they keep is of the last call

    def __init__(
        self, *, size: int, strength: float = 1.0, blur: float = 0.5
    ) -> None:
        check_kornia()
        if not 0 <= strength <= 1.25:  # beyond it, contrast could be negative
            raise ConfigError(
                f'--color-strength must be from 0 to 1.25, got {strength:g}.'
            )
        if not 0 <= blur <= 1:
            raise ConfigError(
                f'--blur must be a probability, from 0 to 1, got {blur:g}.'
            )
        import kornia.augmentation as K

        change, kernel = 0.8 * strength, 2 * (size // 20) + 1
        self.steps: list[Any] = [
            K.RandomHorizontalFlip(p=0.5),
            K.ColorJitter(change, change, change, 0.2 * strength, p=0.8),
            K.RandomGrayscale(p=0.2),
        ]
        if blur and kernel > 1:
            blurred = K.RandomGaussianBlur((kernel, kernel), SIGMA, p=blur)
            self.steps.append(blurred)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Distort images (B, 3, H, W), RGB from 0 to 1."""
        for step in self.steps:
            images = step(images)
        return images.clamp(0, 1)
