"""Photos and annotations that the tests make themselves.

The folder has the layout of ``../shared/data``, so that each can stand in for
the other: ``coco_tiny`` in COCO's layout, ``bccd`` in that of VOC.
"""

import atexit
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import cv2
import numpy as np

from tests.helpers.layouts import make_voc, voc_xml

BESIDE = Path(__file__).resolve().parents[3] / 'shared' / 'data'
SHARED = Path(os.environ.get('MMKD_SHARED_DATA', BESIDE)).absolute()
"""Where real data sets lie. A folder that does not exist hides them."""
SIZES = [(320, 213), (240, 320), (320, 240), (213, 320), (250, 188)]
"""Width and height of the photos in pixels, in turns."""
SPLITS = dict(
    train=range(1000, 1012), val=range(2000, 2008), test=range(3000, 3006)
)
"""The numbers of the photos."""
KINDS = 8
"""Only the first classes of COCO occur."""
CELLS = ('RBC', 'WBC', *['Platelets'] * 6)


@functools.cache
def root() -> Path:
    """Return the folder from which the tests' trainings read their data.

    It is written once in each process, which removes it at its end.
    """
    folder = Path(tempfile.mkdtemp(prefix='mmkd-made-'))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    rng = np.random.default_rng(0)
    for split, keys in SPLITS.items():
        photos = {key: draw(key, rng) for key in keys}
        write_coco(folder / 'coco_tiny', f'{split}2017', photos)
        write_voc(folder / 'bccd' / 'BCCD', split, photos)
    return folder


def draw(key: int, rng: np.random.Generator) -> tuple[np.ndarray, list]:
    """Draw polygons on a textured background.

    Returns:
        The image, BGR of (height, width, 3), and of each object its kind and
        its corners, (corners, 2) in pixels. Every third is of kind 0; those
        of kind ``k`` have ``k + 3`` corners and a colour of their own.
    """
    size = np.array(SIZES[key % len(SIZES)])
    rough = rng.uniform(40, 200, (6, 6, 3))
    image = cv2.resize(rough, tuple(size), interpolation=cv2.INTER_CUBIC)
    image += rng.normal(0, 8, image.shape)
    objects = []
    for index in range(4 + 2 * (key % 5)):
        kind = int(rng.integers(KINDS)) if index % 3 else 0
        half = rng.uniform(0.04, 0.4, 2) * size
        centre = rng.uniform(half + 1, size - half - 1)
        angles = 2 * np.pi * (np.arange(kind + 3) / (kind + 3) + rng.random())
        unit = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        objects.append((kind, (centre + half * unit).round().astype('int32')))
    for kind, corners in reversed(objects):
        colour = [255 * (kind >> bit & 1) for bit in range(3)]
        cv2.fillPoly(image, [corners], colour)
    return image.clip(0, 255).astype('uint8'), objects


def write_coco(root: Path, split: str, photos: dict) -> None:
    """Write photos in COCO's layout; every fourth has a crowd."""
    from mmdet.datasets import CocoDataset

    (root / split).mkdir(parents=True)
    names = enumerate(CocoDataset.METAINFO['classes'])
    categories = [dict(id=2 * k + 1, name=name) for k, name in names]
    images, objects = [], []
    for key, (image, drawn) in photos.items():
        (height, width), name = image.shape[:2], f'{key:012}.jpg'
        cv2.imwrite(str(root / split / name), image)
        size = dict(width=width, height=height)
        images.append(dict(id=key, file_name=name, **size))
        for index, (kind, corners) in enumerate(drawn):
            x, y, w, h = box = cv2.boundingRect(corners)
            crowd = index == 1 and key % 4 == 0
            area = w * h if crowd else cv2.contourArea(corners)
            outline = [corners.ravel().tolist()]
            if crowd:  # run lengths of the box, column by column
                runs = [x * height + y, *[h, height - h] * (w - 1), h]
                runs.append(width * height - sum(runs))
                outline = dict(size=[height, width], counts=runs)
            row = dict(image_id=key, category_id=2 * kind + 1, area=area)
            row |= dict(bbox=box, iscrowd=int(crowd), segmentation=outline)
            objects.append(row | dict(id=len(objects) + 1))
    content = dict(images=images, annotations=objects, categories=categories)
    path = root / 'annotations' / f'instances_{split}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def write_voc(root: Path, split: str, photos: dict) -> None:
    """Write photos in VOC's layout, whose corners count from 1."""
    labels = {}
    for key, (image, drawn) in photos.items():
        cells = []
        for kind, corners in drawn:
            x, y, w, h = cv2.boundingRect(corners)
            cells.append((CELLS[kind], (x + 1, y + 1, x + w, y + h)))
        labels[f'{key:06}'] = voc_xml(*cells, size=image.shape[1::-1])
    make_voc(root, split, labels)
    for key, (image, _) in photos.items():
        cv2.imwrite(f'{root}/JPEGImages/{key:06}.jpg', image)
