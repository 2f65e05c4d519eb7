"""How a picture becomes the input of an ONNX file, and boxes come back."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from mmkd.errors import ConfigError

WHERE = 'distillation.teacher'
RESIZES = ('letterbox', 'fit', 'stretch')
DTYPES = {
    'tensor(float)': np.float32,
    'tensor(float16)': np.float16,
    'tensor(uint8)': np.uint8,
}
"""The types of pixels that a file may take, as onnxruntime calls them."""


class Frame(NamedTuple):
    """Where a picture lies in the input."""

    scale: tuple[float, float]
    """Pixels of the input for each pixel of the picture, along x and y."""
    offset: tuple[int, int]
    """The picture's left and upper edge in the input."""

    def size_of(self, picture: np.ndarray) -> tuple[int, int]:
        """Return height and width of a picture (H, W, 3) in the input."""
        height, width = picture.shape[:2]
        return (
            max(round(height * self.scale[1]), 1),
            max(round(width * self.scale[0]), 1),
        )

    def back(self, boxes: np.ndarray) -> np.ndarray:
        """Return boxes (N, 4), xyxy, in pixels of the picture."""
        shift = np.array(self.offset * 2, np.float32)
        return (boxes - shift) / np.array(self.scale * 2, np.float32)


class Preprocessing:
    """Resizes, pads and normalises pictures as a model expects them.

    Args:
        size: Height and width of the input.
        resize: ``'letterbox'`` keeps the shape of a picture and pads it on
            both sides, ``'fit'`` keeps it and pads right and below, and
            ``'stretch'`` fills the input.
        mean: What is subtracted from each channel, in the input's order.
        std: What each channel is divided by after that.
        to_rgb: Whether the input is RGB; else BGR.
        pad_value: The value of padding before normalisation.

    Raises:
        ConfigError: If an option is wrong.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        resize: str = 'letterbox',
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (255.0, 255.0, 255.0),
        to_rgb: bool = True,
        pad_value: float = 114,
    ) -> None:
        if resize not in RESIZES:
            raise ConfigError(
                f'{WHERE}.resize must be one of {", ".join(RESIZES)}, got '
                f'{resize!r}.'
            )
        for name, values in (('mean', mean), ('std', std)):
            if not _is_three(values) or (name == 'std' and not all(values)):
                raise ConfigError(
                    f'{WHERE}.{name} must be three numbers, one for each '
                    f'channel of the input, and no std of 0; got {values!r}.'
                )
        self.size, self.resize, self.to_rgb = size, resize, to_rgb
        self.mean = np.array(mean, np.float32)
        self.std = np.array(std, np.float32)
        self.pad_value = pad_value

    def __call__(self, picture: np.ndarray) -> tuple[np.ndarray, Frame]:
        """Return the input (3, H, W), float32, and where the picture lies.

        Args:
            picture: (H, W, 3), uint8, RGB.
        """
        canvas, frame = self._fit(picture)
        if not self.to_rgb:
            canvas = canvas[..., ::-1]
        pixels = (canvas.astype(np.float32) - self.mean) / self.std
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)), frame

    def _fit(self, picture: np.ndarray) -> tuple[np.ndarray, Frame]:
        height, width = picture.shape[:2]
        ratios = self.size[0] / height, self.size[1] / width
        if self.resize == 'stretch':
            resized = cv2.resize(picture, self.size[::-1])
            return resized, Frame((ratios[1], ratios[0]), (0, 0))
        scale = min(ratios)
        inner = Frame((scale, scale), (0, 0)).size_of(picture)
        resized = picture
        if (height, width) != inner:
            resized = cv2.resize(picture, inner[::-1])
        canvas = np.full((*self.size, 3), self.pad_value, np.uint8)
        top = left = 0
        if self.resize == 'letterbox':
            # the odd pixel of padding goes right and below
            top, left = (
                (whole - part) // 2
                for whole, part in zip(self.size, inner, strict=True)
            )
        canvas[top : top + inner[0], left : left + inner[1]] = resized
        return canvas, Frame((scale, scale), (left, top))

    def __repr__(self) -> str:
        facts = {k: np.asarray(v).tolist() for k, v in vars(self).items()}
        return f'Preprocessing({facts})'


def _is_three(values: Any) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(
            isinstance(v, int | float) and not isinstance(v, bool)
            for v in values
        )
    )
