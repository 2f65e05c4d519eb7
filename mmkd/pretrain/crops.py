"""The data sets of pretraining: random crops, and crops of objects."""

import logging
from collections.abc import Sequence
from pathlib import Path

import cv2
import mmcv
import numpy as np
import torch
from mmengine.logging import print_log
from torch import Tensor
from torch.utils.data import Dataset

from mmkd.data.layouts import Picture
from mmkd.data.pictures import is_limited, too_large
from mmkd.errors import DataError
from mmkd.registry import DATASETS

from .augment import random_crops


def read_rgb(path: str) -> np.ndarray | None:
    """Return a picture, (H, W, 3), uint8, RGB; None if it cannot be read."""
    if not is_limited() and too_large(path):
        return None
    try:
        return mmcv.imread(path, channel_order='rgb')
    except (OSError, cv2.error, ValueError):
        return None


@DATASETS.register_module()
class RandomCrops(Dataset):
    """Two random crops of each image of a list.

    An image that turns out to be damaged is named once, and the next one of
    the list takes its place.

    Args:
        list_file: A text file with the path of an image in each line.
        size: The sides of a crop, in pixels.
        scale: The least and the largest part of the area that is cut out.
    """

    def __init__(
        self,
        list_file: str,
        *,
        size: int,
        scale: tuple[float, float] = (0.08, 1.0),
    ) -> None:
        self.files = Path(list_file).read_text().splitlines()
        self.size, self.scale = size, (scale[0], scale[1])
        self._damaged: set[int] = set()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``inputs``, (2, 3, size, size), uint8, RGB."""
        picture = torch.from_numpy(self._picture(index)).permute(2, 0, 1)
        return {'inputs': random_crops(picture, 2, self.size, self.scale)}

    def _picture(self, index: int) -> np.ndarray:
        for step in range(len(self)):
            place = (index + step) % len(self)
            picture = read_rgb(self.files[place])
            if picture is not None:
                return picture
            if place not in self._damaged:
                self._damaged.add(place)
                print_log(
                    f'{self.files[place]} is damaged, and left out',
                    'current',
                    logging.WARNING,
                )
        raise DataError(
            f'none of the {len(self)} images can be read, the first is '
            f'{self.files[0]}. Copy them again.'
        )


def object_crops(
    pictures: Sequence[Picture], classes: Sequence[str], size: int, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut objects out of their images, and resize them to a square.

    Args:
        pictures: The images with their objects.
        classes: The names of the classes in the order of their numbers.
        size: The sides of a crop, in pixels.
        most: How many objects are taken, evenly spread over the list.

    Returns:
        The crops, (N, 3, size, size), uint8, RGB; the class and the image of
        each, (N,).
    """
    places = [
        (i, k) for i, p in enumerate(pictures) for k in range(len(p.items))
    ]
    step = max(len(places) / most, 1.0)
    chosen = [places[int(n * step)] for n in range(int(len(places) / step))]
    wanted: dict[int, list[int]] = {}
    for image, item in chosen:
        wanted.setdefault(image, []).append(item)
    crops, labels, images = [], [], []
    for image, items in wanted.items():
        content = read_rgb(str(pictures[image].path))
        if content is None:
            continue
        for item in items:
            name = pictures[image].items[item].name
            crop = _cut(content, pictures[image].items[item].box, size)
            if crop is not None and name in classes:
                crops.append(torch.from_numpy(crop).permute(2, 0, 1))
                labels.append(classes.index(name))
                images.append(image)
    return torch.stack(crops), torch.tensor(labels), torch.tensor(images)


def _cut(
    content: np.ndarray, box: tuple[float, float, float, float], size: int
) -> np.ndarray | None:
    """Return a box (x, y, width, height) as a square; None if it is empty."""
    height, width = content.shape[:2]
    x, y, w, h = box
    left, top = max(round(x), 0), max(round(y), 0)
    right, bottom = min(round(x + w), width), min(round(y + h), height)
    if right - left < 2 or bottom - top < 2:
        return None
    return cv2.resize(content[top:bottom, left:right], (size, size))
