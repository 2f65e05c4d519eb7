"""Annotations in COCO's format: check them, and write them."""

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .errors import COCO_REMEDY, data_error, some
from .files import StrPath, check_files, read_json

Box = tuple[float, float, float, float]
"""``(x0, y0, x1, y1)`` in pixels; ``x1`` and ``y1`` lie just outside."""
Types = dict[str, tuple[type, ...]]

_ID = (int, str)
_NUMBER = (int, float)
_TABLES: dict[str, Types] = {
    'images': {
        'id': _ID,
        'file_name': (str,),
        'width': _NUMBER,
        'height': _NUMBER,
    },
    'annotations': {
        'id': _ID,
        'image_id': _ID,
        'category_id': _ID,
        'bbox': (list,),
        'area': _NUMBER,
    },
    'categories': {'id': _ID, 'name': (str,)},
}
"""What pycocotools and mmdet read of each entry, and of which type."""


def check_coco_annotations(
    path: StrPath,
    image_root: StrPath | None = None,
    *,
    annotated: bool = True,
    remedy: str = COCO_REMEDY,
) -> dict[str, int]:
    """Check a COCO annotation file, and that its images exist.

    Args:
        path: The file, in the format of ``instances_train2017.json``.
        image_root: The folder that each ``file_name`` is relative to; with
            ``None`` no image is looked for. No image is opened, so this
            costs far less than reading ``path``.
        annotated: Whether ``annotations`` must be there; the images of a
            test server come without.
        remedy: The last sentence of every error.

    Returns:
        How many ``images``, ``annotations`` and ``categories`` there are.

    Raises:
        DataError: The file is missing, empty, malformed or cut off; a key is
            missing; an id is used twice; an annotation names an image or a
            category that the file lacks, or its box is not four finite
            numbers; or an image does not exist.
    """
    path = Path(path)
    data = read_json(path, remedy=remedy)
    if not isinstance(data, dict):
        got = f'a {type(data).__name__}'
        if isinstance(data, list):
            got = 'a list (a file of results?)'
        raise data_error(path, 'an object of COCO annotations', got, remedy)
    if not annotated:
        data = {'annotations': [], **data}
    for key in _TABLES:
        may_be_empty = key == 'annotations' and not annotated
        _check_table(path, data, key, may_be_empty, remedy)
    _check_references(path, data, remedy)
    if image_root is not None:
        root = Path(image_root)
        if not root.is_dir():
            raise data_error(root, 'the folder of images', 'nothing', remedy)
        names = (image['file_name'] for image in data['images'])
        check_files(root, names, path, remedy)
    return {key: len(data[key]) for key in _TABLES}


def _check_table(
    path: Path, data: dict[str, Any], key: str, may_be_empty: bool, remedy: str
) -> None:
    fail = partial(data_error, remedy=remedy)
    if key not in data:
        found = f'only {some(map(repr, data), 6)}' if data else 'no key'
        raise fail(path, f'the key {key!r}', found)
    rows = data[key]
    if not isinstance(rows, list) or not (rows or may_be_empty):
        got = 'an empty one' if rows == [] else f'a {type(rows).__name__}'
        raise fail(path, f'a list of {key}', got)
    types = _TABLES[key]
    for index, row in enumerate(rows):
        if problem := _problem(row, types):
            expected = f'an object with {", ".join(types)}'
            raise fail(f'{path}: {key}[{index}]', expected, problem)
    counts = Counter(row['id'] for row in rows)
    if len(counts) != len(rows):
        twice = [number for number, count in counts.items() if count > 1]
        got = f'{len(twice)} used more than once: {some(twice)}'
        raise fail(f'{path}: {key}', 'each id once', got)


def _problem(row: object, types: Types) -> str:
    """Say what an entry lacks; an empty string means nothing."""
    if not isinstance(row, dict):
        return f'a {type(row).__name__}'
    return ', '.join(
        f'{name}={row[name]!r}' if name in row else f'no {name}'
        for name, allowed in types.items()
        if not isinstance(row.get(name), allowed)
    )


def _check_references(path: Path, data: dict[str, Any], remedy: str) -> None:
    for key, table in (('image_id', 'images'), ('category_id', 'categories')):
        known = {row['id'] for row in data[table]}
        rows = data['annotations']
        lost = [row['id'] for row in rows if row[key] not in known]
        if lost:
            expected = f'annotations of its own {table}'
            got = f'{len(lost)} with an unknown {key}: ids {some(lost)}'
            raise data_error(path, expected, got, remedy)
    for row in data['annotations']:
        box = row['bbox']
        if not (
            len(box) == 4
            and all(isinstance(value, _NUMBER) for value in box)
            and math.isfinite(sum(box))
        ):
            where = f'{path}: annotation {row["id"]}'
            expected = 'bbox as 4 numbers (x, y, width, height)'
            raise data_error(where, expected, f'{box!r}', remedy)


class CocoAnnotations:
    """Annotations in COCO's format, filled image by image.

    Whatever layout data come in, they are converted through this class. Ids
    count from 1, because COCO's evaluation takes an annotation with the id 0
    for unmatched; categories have the order of ``classes``.

    Attributes:
        content: What :func:`write_json` writes.
        clipped: The notes of boxes that reached out of their image.
        dropped: The notes of boxes without area inside of their image.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.ids = {name: number for number, name in enumerate(classes, 1)}
        self.content: dict[str, list[dict[str, Any]]] = {
            'images': [],
            'annotations': [],
            'categories': [{'id': i, 'name': n} for n, i in self.ids.items()],
        }
        self.clipped: list[str] = []
        self.dropped: list[str] = []

    def add_image(self, file_name: str, width: int, height: int) -> None:
        """Add an image; the boxes that follow are on it."""
        images = self.content['images']
        images.append(
            {
                'id': len(images) + 1,
                'file_name': file_name,
                'width': width,
                'height': height,
            }
        )

    def add_box(
        self, name: str, box: Box, *, crowd: bool = False, note: str = ''
    ) -> None:
        """Clip a box to the latest image and add it, unless nothing is left.

        Args:
            name: One of the classes.
            box: ``(x0, y0, x1, y1)`` in pixels. Whole numbers are written
                without a decimal point.
            crowd: Whether the box is neither learnt nor counted.
            note: How users find the box, for ``clipped`` and ``dropped``.
        """
        image = self.content['images'][-1]
        x0, y0 = max(box[0], 0), max(box[1], 0)
        x1, y1 = min(box[2], image['width']), min(box[3], image['height'])
        if not (x0 < x1 and y0 < y1):
            self.dropped.append(note)
            return
        if (x0, y0, x1, y1) != tuple(box):
            self.clipped.append(note)
        x0, y0, x1, y1 = (
            int(v) if v == int(v) else v for v in (x0, y0, x1, y1)
        )
        annotations = self.content['annotations']
        annotations.append(
            {
                'id': len(annotations) + 1,
                'image_id': image['id'],
                'category_id': self.ids[name],
                'bbox': [x0, y0, x1 - x0, y1 - y0],
                'area': (x1 - x0) * (y1 - y0),
                'iscrowd': int(crowd),
            }
        )
