"""How a picture is put into the image that an exported detector reads."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from mmkd.data.datasets import leaves
from mmkd.errors import ConfigError

KNOWN = {
    *('LoadImageFromFile', 'LoadAnnotations', 'LoadEmptyAnnotations'),
    *('Resize', 'FixShapeResize', 'Pad', 'PackDetInputs'),
}
"""Transforms of a test pipeline that a canvas takes the place of."""


@dataclass(frozen=True)
class Canvas:
    """An image of one size, (H, W, 3), with the picture in its upper left.

    Attributes:
        height: In pixels.
        width: In pixels.
        keep_ratio: Whether a picture keeps its shape, or fills the image.
        padding: The value of the other pixels where the pipeline pads; None
            where the data preprocessor does.
        unknown: The transforms of the pipeline that it leaves out.
    """

    height: int
    width: int
    keep_ratio: bool = True
    padding: float | None = None
    unknown: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    def fit(self, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the image, and the size (height, width) of the picture."""
        height, width = picture.shape[:2]
        scale = min(self.height / height, self.width / width)
        size = self.shape
        if self.keep_ratio:
            size = (
                max(round(height * scale), 1),
                max(round(width * scale), 1),
            )
        image = np.zeros((*self.shape, 3), np.uint8)
        image[: size[0], : size[1]] = cv2.resize(picture, size[::-1])
        return image, np.array(size)


def canvas_for(
    config: Mapping[str, Any],
    divisor: int,
    size: tuple[int, int] | None = None,
) -> Canvas:
    """Return the canvas that fits a config's test pipeline.

    Args:
        config: The whole config.
        divisor: What the sides have to be multiples of.
        size: (H, W), if it is not that of the pipeline.

    Raises:
        ConfigError: If the size is not known, or no multiple.
    """
    steps = {name_of(step): step for step in pipeline_of(config)}
    resize = steps.get('Resize', steps.get('FixShapeResize', {}))
    if size is None:
        width, height = scale_of(resize)
        # as the data preprocessor pads
        size = (
            math.ceil(height / divisor) * divisor,
            math.ceil(width / divisor) * divisor,
        )
    elif any(side % divisor for side in size):
        near = [max(round(side / divisor), 1) * divisor for side in size]
        raise ConfigError(
            f'--size: the detector pads the sides of its images to multiples '
            f'of {divisor} (data_preprocessor.pad_size_divisor), got '
            f'{size[0]} {size[1]}. Give {near[0]} {near[1]}, say.'
        )
    return Canvas(
        *size,
        # without a resizing, pictures do not get another shape
        keep_ratio=bool(resize.get('keep_ratio', not resize)),
        padding=padding_of(steps['Pad']) if 'Pad' in steps else None,
        unknown=tuple(name for name in steps if name not in KNOWN),
    )


def pipeline_of(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    dataset = test_dataset(config)
    return list(dataset.get('pipeline') or config.get('test_pipeline') or [])


def test_dataset(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The data set of the test, or of the validation, without wrappers."""
    for name in ('test_dataloader', 'val_dataloader'):
        dataset = (config.get(name) or {}).get('dataset') or {}
        if dataset:
            return next(leaves(dataset))
    return {}


def name_of(step: Mapping[str, Any]) -> str:
    kind = step.get('type')
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]


def scale_of(resize: Mapping[str, Any]) -> tuple[int, int]:
    scale: Any = resize.get('scale')
    scale = scale or (resize.get('width'), resize.get('height'))
    if isinstance(scale, int):
        scale = (scale, scale)
    if not all(isinstance(side, int) for side in scale):
        raise ConfigError(
            'the size of the images is not known: the test pipeline of the '
            'config has no Resize with a `scale` of (width, height). Give '
            'it: --size H W.'
        )
    return scale[0], scale[1]


def padding_of(pad: Mapping[str, Any]) -> float:
    value = pad.get('pad_val', 0)
    value = value.get('img', 0) if isinstance(value, Mapping) else value
    values = set(value) if isinstance(value, list | tuple) else {value}
    if len(values) > 1:
        raise ConfigError(
            f'Pad of the test pipeline pads with {value}. A graph pads every '
            'channel with the same value: give `pad_val` one.'
        )
    return float(values.pop())
