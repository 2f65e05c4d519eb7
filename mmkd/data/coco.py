"""COCO annotations: check them, and that their images exist."""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import COCO_REMEDY, data_error, some
from .files import StrPath, list_folder, read_json

_ID = (int, str)
_NUMBER = (int, float)
_COCO_KEYS: dict[str, dict[str, tuple[type, ...]]] = {
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
        image_root: Folder that the ``file_name`` of each image is relative
            to; ``None`` looks at no image. Each folder is listed once and
            no image is opened, so this costs far less than reading ``path``.
        annotated: Whether ``annotations`` have to be there; images of a
            test server come without.
        remedy: Last sentence of every error.

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
    for key in _COCO_KEYS:
        may_be_empty = key == 'annotations' and not annotated
        _check_table(path, data, key, may_be_empty, remedy)
    _check_references(path, data, remedy)
    if image_root is not None:
        names = (image['file_name'] for image in data['images'])
        _check_images(path, names, Path(image_root), remedy)
    return {key: len(data[key]) for key in _COCO_KEYS}


def _check_table(
    path: Path, data: dict[str, Any], key: str, may_be_empty: bool, remedy: str
) -> None:
    if key not in data:
        found = f'only {some(map(repr, data), 6)}' if data else 'no key'
        raise data_error(path, f'the key {key!r}', found, remedy)
    rows = data[key]
    if not isinstance(rows, list) or not (rows or may_be_empty):
        got = 'an empty one' if rows == [] else f'a {type(rows).__name__}'
        raise data_error(path, f'a list of {key}', got, remedy)
    needed = _COCO_KEYS[key]
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or any(
            not isinstance(row.get(name), types)
            for name, types in needed.items()
        ):
            where = f'{path}: {key}[{index}]'
            expected = f'an object with {", ".join(needed)}'
            raise data_error(where, expected, _describe(row, needed), remedy)
    ids = Counter(row['id'] for row in rows)
    if len(ids) != len(rows):
        twice = [number for number, count in ids.items() if count > 1]
        got = f'{len(twice)} used more than once: {some(twice)}'
        raise data_error(f'{path}: {key}', 'each id once', got, remedy)


def _describe(row: object, needed: dict[str, tuple[type, ...]]) -> str:
    if not isinstance(row, dict):
        return f'a {type(row).__name__}'
    wrong = []
    for name, types in needed.items():
        if name not in row:
            wrong.append(f'no {name}')
        elif not isinstance(row[name], types):
            wrong.append(f'{name}={row[name]!r}')
    return ', '.join(wrong)


def _check_references(path: Path, data: dict[str, Any], remedy: str) -> None:
    for key, table in (('image_id', 'images'), ('category_id', 'categories')):
        known = {row['id'] for row in data[table]}
        lost = [
            row['id'] for row in data['annotations'] if row[key] not in known
        ]
        if lost:
            expected = f'annotations of its own {table}'
            got = f'{len(lost)} with an unknown {key}: ids {some(lost)}'
            raise data_error(path, expected, got, remedy)
    for row in data['annotations']:
        if not _is_box(row['bbox']):
            where = f'{path}: annotation {row["id"]}'
            expected = 'bbox as 4 numbers (x, y, width, height)'
            raise data_error(where, expected, f'{row["bbox"]!r}', remedy)


def _is_box(box: list[Any]) -> bool:
    return (
        len(box) == 4
        and all(isinstance(value, _NUMBER) for value in box)
        and math.isfinite(sum(box))
    )


def _check_images(
    path: Path, names: Iterable[str], root: Path, remedy: str
) -> None:
    if not root.is_dir():
        raise data_error(f'{root}', 'the folder of images', 'nothing', remedy)
    listed: dict[str, set[str]] = {}
    missing = []
    for name in names:
        folder, _, base = name.rpartition('/')
        if folder not in listed:
            listed[folder] = list_folder(root / folder)
        if base not in listed[folder]:
            missing.append(name)
    if missing:
        expected = f'every image that {path} names'
        got = f'{len(missing)} missing: {some(missing)}'
        raise data_error(root, expected, got, remedy)
