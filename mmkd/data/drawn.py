"""Photos that are drawn, with annotations in COCO's layout.

They stand in for a data set where a training is to be tried and not to learn.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

SIZES = [(320, 213), (240, 320), (320, 240), (213, 320), (250, 188)]
"""Width and height of the photos in pixels, in turns."""
KINDS = 8
"""At most so many classes occur, the first ones."""
Photos = Mapping[int, tuple[np.ndarray, list[tuple[int, np.ndarray]]]]
"""By number: the image and its objects, as :func:`draw` returns them."""


def draw(
    key: int, rng: np.random.Generator, kinds: int = KINDS
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Draw polygons on a textured background.

    Args:
        key: The number of the photo, which decides on its size and on how
            many objects it has.
        rng: Draws everything else.
        kinds: How many kinds of objects there are.

    Returns:
        The image, BGR of (height, width, 3), and of each object its kind and
        its corners, (corners, 2) in pixels. Every third is of kind 0; those
        of kind ``k`` have ``k + 3`` corners and a colour of their own.
    """
    size = np.array(SIZES[key % len(SIZES)])
    rough = rng.uniform(40, 200, (6, 6, 3))
    image: np.ndarray = cv2.resize(
        rough, (int(size[0]), int(size[1])), interpolation=cv2.INTER_CUBIC
    )
    image = image + rng.normal(0, 8, image.shape)
    objects = []
    for index in range(4 + 2 * (key % 5)):
        kind = int(rng.integers(kinds)) if index % 3 else 0
        half = rng.uniform(0.04, 0.4, 2) * size
        centre = rng.uniform(half + 1, size - half - 1)
        angles = 2 * np.pi * (np.arange(kind + 3) / (kind + 3) + rng.random())
        unit = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        objects.append((kind, (centre + half * unit).round().astype('int32')))
    for kind, corners in reversed(objects):
        colour = [255 * (kind >> bit & 1) for bit in range(3)]
        cv2.fillPoly(image, [corners], colour)
    return image.clip(0, 255).astype('uint8'), objects


def write_coco(
    root: Path, split: str, photos: Photos, classes: Sequence[str]
) -> None:
    """Write photos in COCO's layout; every fourth has a crowd.

    Args:
        root: The folder of the data set.
        split: The name of the folder of the images, such as ``train2017``.
        photos: What :func:`draw` has returned, by number.
        classes: The names of all categories; kind ``k`` is the k-th.
    """
    (root / split).mkdir(parents=True)
    names = enumerate(classes)
    categories = [dict(id=2 * k + 1, name=name) for k, name in names]
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for key, (image, drawn) in photos.items():
        (height, width), name = image.shape[:2], f'{key:012}.jpg'
        cv2.imwrite(str(root / split / name), image)
        size = dict(width=width, height=height)
        images.append(dict(id=key, file_name=name, **size))
        for index, (kind, corners) in enumerate(drawn):
            x, y, w, h = box = cv2.boundingRect(corners)
            crowd = index == 1 and key % 4 == 0
            area = w * h if crowd else cv2.contourArea(corners)
            outline: Any = [corners.ravel().tolist()]
            if crowd:  # run lengths of the box, column by column
                runs = [x * height + y, *[h, height - h] * (w - 1), h]
                runs.append(width * height - sum(runs))
                outline = dict(size=[height, width], counts=runs)
            row: dict[str, Any] = dict(image_id=key, category_id=2 * kind + 1)
            row |= dict(area=area, bbox=box, iscrowd=int(crowd))
            row |= dict(segmentation=outline, id=len(objects) + 1)
            objects.append(row)
    content = dict(images=images, annotations=objects, categories=categories)
    path = root / 'annotations' / f'instances_{split}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
