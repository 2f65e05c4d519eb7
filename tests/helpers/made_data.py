"""Photos and annotations that the tests make themselves.

The folder has the layout of ``../shared/data``, so that each can stand in for
the other: ``coco_tiny`` in COCO's layout, ``bccd`` in that of VOC.
"""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

import cv2
import numpy as np

from mmkd.data.drawn import draw, write_coco
from tests.helpers.layouts import make_voc, voc_xml

BESIDE = Path(__file__).resolve().parents[3] / 'shared' / 'data'
SHARED = Path(os.environ.get('MMKD_SHARED_DATA', BESIDE)).absolute()
"""Where real data sets lie. A folder that does not exist hides them."""
SPLITS = dict(
    train=range(1000, 1012), val=range(2000, 2008), test=range(3000, 3006)
)
"""The numbers of the photos."""
CELLS = ('RBC', 'WBC', *['Platelets'] * 6)


@functools.cache
def root() -> Path:
    """Return the folder from which the tests' trainings read their data.

    It is written once in each process, which removes it at its end.
    """
    from mmdet.datasets import CocoDataset

    folder = Path(tempfile.mkdtemp(prefix='mmkd-made-'))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    rng = np.random.default_rng(0)
    classes = CocoDataset.METAINFO['classes']
    for split, keys in SPLITS.items():
        photos = {key: draw(key, rng) for key in keys}
        write_coco(folder / 'coco_tiny', f'{split}2017', photos, classes)
        write_voc(folder / 'bccd' / 'BCCD', split, photos)
    return folder


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
