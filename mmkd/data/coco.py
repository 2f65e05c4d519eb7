"""Annotations in COCO's format: check them, and write them."""

import json
import mmap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .errors import COCO_REMEDY, data_error, some
from .files import StrPath, check_files, is_number, read_json, shown
from .masks import mask_problem

Box = tuple[float, float, float, float]
"""``(x0, y0, x1, y1)`` in pixels; ``x1`` and ``y1`` lie just outside."""
Types = dict[str, Callable[[Any], bool]]
SHAPES = {'bbox': 'bbox', 'segm': 'segmentation'}
"""The key of a result's shape by the kind of result."""


def is_id(value: object) -> bool:
    """Whether a value can tell images, objects or classes apart.

    COCO's evaluation keeps ids as floating-point numbers, which are exact up
    to 2⁵³.
    """
    if type(value) is int:
        return -(2**53) <= value <= 2**53
    return isinstance(value, str)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _is_side(value: Any) -> bool:
    return is_number(value) and value > 0


def _is_area(value: Any) -> bool:
    return is_number(value) and value >= 0


_TABLES: dict[str, Types] = {
    'images': {
        'id': is_id,
        'file_name': _is_text,
        'width': _is_side,
        'height': _is_side,
    },
    'annotations': {
        'id': is_id,
        'image_id': is_id,
        'category_id': is_id,
        'bbox': _is_list,
        'area': _is_area,
    },
    'categories': {'id': is_id, 'name': _is_text},
}
"""What pycocotools and mmdet read of each entry, and what it has to be."""


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
            numbers, the last two from 0; or an image does not exist.
    """
    data = read_json(path, remedy=remedy)
    return check_coco_content(
        path, data, image_root, annotated=annotated, remedy=remedy
    )


def check_coco_content(
    path: StrPath,
    data: Any,
    image_root: StrPath | None = None,
    *,
    annotated: bool = True,
    remedy: str = COCO_REMEDY,
) -> dict[str, int]:
    """Check what was read of a file; see :func:`check_coco_annotations`."""
    path = Path(path)
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


def read_categories(path: StrPath) -> list[dict[str, Any]] | None:
    """Return only the categories of a COCO annotation file, quickly.

    The images and annotations, which are nearly all of a large file, are not
    parsed.

    Returns:
        The ids and names in the file's order; None if the file has no such
        list, or cannot be read.
    """
    try:
        with (
            open(path, 'rb') as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            start = content.rfind(b'"categories"')
            if start < 0:
                return None
            rows = _list_after(content, start + len(b'"categories"'))
    except (OSError, ValueError, RecursionError):
        return None
    if isinstance(rows, list) and not any(
        _problem(row, _TABLES['categories']) for row in rows
    ):
        return rows
    return None


def _list_after(content: mmap.mmap, start: int) -> object:
    """Parse the value after a key, reading no more than it takes."""
    size = 2**16
    while True:
        part = content[start : start + size]
        text = part.decode(errors='replace').lstrip(': \t\r\n')
        try:
            return json.JSONDecoder().raw_decode(text)[0]
        except ValueError:
            if start + size >= len(content):
                raise
            size *= 4


def object_classes(
    path: StrPath,
    data: dict[str, Any],
    *others: dict[str, Any],
    remedy: str = COCO_REMEDY,
) -> tuple[list[str], list[str]]:
    """Return the names of the classes in a COCO annotation file.

    Some tools (Roboflow) write a category that only groups the others: no
    object has it, and it is their ``supercategory``, or has the id 0 and the
    ``supercategory`` "none", unlike others. It is no class.

    Args:
        path: The file, for messages.
        data: The content of the file.
        others: The contents of further files of the same classes, which may
            have objects that ``data`` lacks.
        remedy: The last sentence of every error.

    Returns:
        The names of the classes in the file's order, which is that of
        MMDetection's labels, and the names of the groups.

    Raises:
        DataError: Two classes have one name, so that MMDetection would give
            their objects two labels for one class.
    """
    rows = data['categories']
    used = {
        row['category_id']
        for each in (data, *others)
        for row in each.get('annotations', ())
        if isinstance(row, dict) and is_id(row.get('category_id'))
    }
    parents = {
        parent
        for row in rows
        if not _is_own_parent(row)
        and isinstance(parent := row.get('supercategory'), str | None)
    }
    groups = [
        row
        for row in rows
        if row['id'] not in used
        and (row['name'] in parents or _is_first_of_none(row, parents))
    ]
    names = [row['name'] for row in rows if row not in groups]
    every = Counter(row['name'] for row in rows)
    twice = [name for name in dict.fromkeys(names) if every[name] > 1]
    if twice:
        raise data_error(
            f'{path}: categories',
            'each name once',
            f'more than one category of {some(twice)}',
            remedy,
        )
    return names, [row['name'] for row in groups]


def _is_own_parent(row: dict[str, Any]) -> bool:
    return row.get('supercategory') == row['name']


def _is_first_of_none(row: dict[str, Any], parents: set[Any]) -> bool:
    none = row.get('supercategory') == 'none'
    return none and row['id'] == 0 and bool(parents - {'none'})


def _check_table(
    path: Path, data: dict[str, Any], key: str, may_be_empty: bool, remedy: str
) -> None:
    fail = partial(data_error, remedy=remedy)
    if key not in data:
        found = f'only {some(map(shown, data), 6)}' if data else 'no key'
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
        f'{name}={shown(row[name])}' if name in row else f'no {name}'
        for name, is_right in types.items()
        if not (name in row and is_right(row[name]))
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
        if not is_box(box):
            where = f'{path}: annotation {row["id"]}'
            expected = 'bbox as 4 numbers (x, y, width, height)'
            raise data_error(where, expected, shown(box), remedy)


def is_box(box: list[Any]) -> bool:
    """Whether a list is x, y, width and height, the latter not below 0."""
    return len(box) == 4 and all(map(is_number, box)) and min(box[2:]) >= 0


def problem_of(
    row: Any, kind: str, sizes: Mapping[Any, list[int]] = MappingProxyType({})
) -> str | None:
    """Say what is wrong with one entry of a result file.

    Args:
        row: The entry.
        kind: ``bbox`` or ``segm``.
        sizes: Height and width of each image; masks are checked against them.
    """
    if not isinstance(row, dict):
        return f'a {type(row).__name__}'
    for key in ('image_id', 'category_id', 'score', SHAPES[kind]):
        if key not in row:
            return f'no {key}, only {some(row, 6)}'
        if key.endswith('_id') and not is_id(row[key]):
            return f'{key}={shown(row[key])}'
    shape, numbers = row[SHAPES[kind]], [row['score']]
    if kind == 'bbox':
        if not isinstance(shape, list) or len(shape) != 4:
            return f'bbox={shown(shape)}, which is not 4 numbers'
        numbers += shape
    else:
        if not isinstance(shape, dict) or type(shape.get('counts')) is not str:
            return 'a segmentation that is not a compressed RLE'
        size = sizes.get(row['image_id'])
        if size and (problem := mask_problem(shape, *size)):
            return problem
    for value in numbers:
        if not is_number(value):
            return f'{shown(value)} in its score or box'
    if kind == 'bbox' and not is_box(shape):
        return f'bbox={shown(shape)}, which is less than nothing'
    return None


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

    def add_object(
        self,
        name: str,
        bbox: Sequence[float],
        *,
        area: float | None = None,
        crowd: bool = False,
        outline: Any = None,
    ) -> None:
        """Add an object to the latest image as it stands.

        Args:
            name: One of the classes.
            bbox: ``(x, y, width, height)`` in pixels, whatever they are.
            area: In pixels; by default that of the box.
            crowd: Whether the object is neither learnt nor counted.
            outline: Its ``segmentation`` in COCO's form.
        """
        annotations = self.content['annotations']
        row: dict[str, Any] = {
            'id': len(annotations) + 1,
            'image_id': self.content['images'][-1]['id'],
            'category_id': self.ids[name],
            'bbox': list(bbox),
            'area': bbox[2] * bbox[3] if area is None else area,
            'iscrowd': int(crowd),
        }
        if outline:
            row['segmentation'] = outline
        annotations.append(row)

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
        bbox = (x0, y0, x1 - x0, y1 - y0)
        self.add_object(name, bbox, crowd=crowd)
