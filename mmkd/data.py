"""Annotations on disk: check them, and convert VOC to COCO.

The module needs the standard library only, so data can be prepared on a
machine where neither torch nor mmdet is installed. Whatever a user can cause
is raised as :class:`DataError`: one line that says where, what was expected,
what was found, and the remedy.
"""

import json
import math
import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

StrPath = str | os.PathLike[str]
Box = tuple[float, float, float, float]
"""``(x0, y0, x1, y1)`` in pixels, ``x1`` and ``y1`` just outside."""

COCO_REMEDY = (
    'For COCO run `python tools/prepare_data.py coco` (with `--from FOLDER` '
    'for a local copy); mend or replace any other data.'
)
VOC_REMEDY = (
    'For VOC run `python tools/prepare_data.py voc` (with `--from FOLDER` '
    'for a local copy); mend or replace any other data.'
)


class DataError(ValueError):
    """Data that cannot be used as it is, told in one line."""


def data_error(
    where: object, expected: str, got: str, remedy: str
) -> DataError:
    """The one line of every error: where, expected, got, remedy."""
    return DataError(f'{where}: expected {expected}, got {got}. {remedy}')


def _some(names: Iterable[object], shown: int = 3) -> str:
    """The first few names and how many more there are."""
    names = list(names)
    more = len(names) - shown
    text = ', '.join(str(name) for name in names[:shown])
    return text + (f' and {more} more' if more > 0 else '')


# ------------------------------------------------------------- JSON, COCO


def read_json(path: StrPath, *, remedy: str = COCO_REMEDY) -> Any:
    """Read a JSON file.

    Raises:
        DataError: No such file, an empty one, or one that is not JSON or
            ends midway.
    """
    path = Path(path)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise data_error(path, 'a JSON file', 'nothing', remedy) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise data_error(path, 'a JSON file', f'"{reason}"', remedy) from None
    if not text.strip():
        raise data_error(path, 'a JSON file', 'an empty file', remedy)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        rest = error.doc[error.pos :].strip()
        if not rest or error.msg.startswith('Unterminated string'):
            got = f'one that ends midway, after {len(text)} bytes'
        else:
            got = f'{error.msg} at line {error.lineno}, column {error.colno}'
    except (UnicodeDecodeError, RecursionError) as error:
        got = f'bytes that are none ({error})'
    raise data_error(path, 'a JSON file', got, remedy)


def write_json(path: StrPath, content: Any) -> bool:
    """Write JSON in one step; a file that already says the same is left.

    Returns:
        Whether the file was written.
    """
    path = Path(path)
    text = json.dumps(content, separators=(',', ':')) + '\n'
    if path.is_file() and path.read_text(encoding='utf-8') == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())
    return True


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes its name only once it is written in full.

    On an exception, Ctrl-C included, nothing is left and what had the name
    before is untouched.
    """
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with temporary.open('wb') as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        found = f'only {_some(map(repr, data), 6)}' if data else 'no key'
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
        got = f'{len(twice)} used more than once: {_some(twice)}'
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
            got = f'{len(lost)} with an unknown {key}: ids {_some(lost)}'
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
            listed[folder] = _list(root / folder)
        if base not in listed[folder]:
            missing.append(name)
    if missing:
        expected = f'every image that {path} names'
        got = f'{len(missing)} missing: {_some(missing)}'
        raise data_error(root, expected, got, remedy)


def _list(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return set()


# -------------------------------------------------------------------- VOC


@dataclass(frozen=True)
class VocObject:
    """One ``<object>``: its class, its box as written, its flag."""

    name: str
    box: Box
    difficult: bool


@dataclass(frozen=True)
class VocImage:
    """One annotation file; ``width`` and ``height`` in pixels."""

    width: int
    height: int
    objects: tuple[VocObject, ...]


def read_voc_xml(
    text: bytes, where: object, *, remedy: str = VOC_REMEDY
) -> VocImage:
    """Read an annotation in the XML of Pascal VOC.

    Args:
        text: Content of the file.
        where: Name of the file, for errors.
        remedy: Last sentence of every error.

    Raises:
        DataError: The XML is malformed, or lacks a size, a name, or a box
            of four finite numbers.
    """
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        got = f'malformed XML ({error})' if text.strip() else 'an empty file'
        raise data_error(where, 'a VOC annotation', got, remedy) from None
    width = _number(root, 'size/width', where, remedy)
    height = _number(root, 'size/height', where, remedy)
    if width < 1 or height < 1:
        got = f'{width:g} x {height:g}'
        raise data_error(where, 'the size of the image', got, remedy)
    objects = []
    for node in root.findall('object'):
        name = (node.findtext('name') or '').strip()
        if not name:
            raise data_error(
                where, 'a <name> in each <object>', 'none', remedy
            )
        x0, y0, x1, y1 = (
            _number(node, f'bndbox/{key}', where, remedy)
            for key in ('xmin', 'ymin', 'xmax', 'ymax')
        )
        difficult = (node.findtext('difficult') or '0').strip() == '1'
        objects.append(VocObject(name, (x0, y0, x1, y1), difficult))
    return VocImage(int(width), int(height), tuple(objects))


def _number(
    node: ElementTree.Element, path: str, where: object, remedy: str
) -> float:
    text = node.findtext(path)
    try:
        value = float(text or '')
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        got = 'none' if text is None else repr(text)
        raise data_error(where, f'a number in <{path}>', got, remedy)
    return value


def _read_voc_split(root: Path, split: str, remedy: str) -> list[str]:
    """Names of a split, each with an annotation and an image."""
    path = root / 'ImageSets' / 'Main' / f'{split}.txt'
    if not path.is_file():
        raise data_error(path, 'the list of a split', 'nothing', remedy)
    names = path.read_text(encoding='utf-8', errors='replace').split('\n')
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise data_error(
            path, 'one image name a line', 'an empty file', remedy
        )
    odd = [name for name in names if len(name.split()) > 1]
    if odd:
        got = f'{len(odd)} other lines: {_some(map(repr, odd))}'
        raise data_error(path, 'one image name a line', got, remedy)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        got = f'{len(twice)} more than once: {_some(twice)}'
        raise data_error(path, 'each image once', got, remedy)
    for folder, suffix in (('Annotations', '.xml'), ('JPEGImages', '.jpg')):
        files = _list(root / folder)
        missing = [n + suffix for n in names if n + suffix not in files]
        if missing:
            expected = f'every file that {path} names'
            got = f'{len(missing)} missing: {_some(missing)}'
            raise data_error(root / folder, expected, got, remedy)
    return names


def _read_voc_image(
    root: Path, name: str, classes: Sequence[str] | None, remedy: str
) -> VocImage:
    path = root / 'Annotations' / f'{name}.xml'
    image = read_voc_xml(path.read_bytes(), path, remedy=remedy)
    if classes is not None:
        unknown = {item.name for item in image.objects} - set(classes)
        if unknown:
            expected = f'objects of the classes {", ".join(classes)}'
            raise data_error(path, expected, _some(sorted(unknown)), remedy)
    return image


def voc_check(
    root: StrPath,
    split: str,
    *,
    classes: Sequence[str] | None = None,
    remedy: str = VOC_REMEDY,
) -> dict[str, int]:
    """Check one split of a folder in the layout of Pascal VOC.

    Args:
        root: Folder with ``Annotations``, ``JPEGImages`` and
            ``ImageSets/Main``, such as ``data/VOCdevkit/VOC2007``.
        split: Name of a list in ``ImageSets/Main``, such as ``trainval``.
        classes: The classes there may be; ``None`` allows any.
        remedy: Last sentence of every error.

    Returns:
        How many ``images`` and ``objects`` there are.

    Raises:
        DataError: The list is missing, empty or of another format, a file
            that it names does not exist, an annotation is malformed, or its
            class is unknown.
    """
    root = Path(root)
    names = _read_voc_split(root, split, remedy)
    objects = sum(
        len(_read_voc_image(root, name, classes, remedy).objects)
        for name in names
    )
    return {'images': len(names), 'objects': objects}


@dataclass
class Conversion:
    """COCO annotations, and what could not be taken over as it was."""

    coco: dict[str, list[dict[str, Any]]]
    clipped: list[str] = field(default_factory=list)
    """Boxes that left their image: name of the image, class, box."""
    dropped: list[str] = field(default_factory=list)
    """Boxes without area inside of their image, told likewise."""


def voc_to_coco(
    sources: Sequence[tuple[StrPath, str]],
    classes: Sequence[str],
    *,
    one_based: bool = False,
    relative_to: StrPath | None = None,
    remedy: str = VOC_REMEDY,
) -> Conversion:
    """Convert splits in the layout of Pascal VOC to COCO annotations.

    Boxes become ``[x, y, width, height]``, clipped to the image; those
    without area are dropped, and both are told. Ids count from 1 in the
    order of the lists (the COCO evaluation takes an annotation of id 0 for
    unmatched), categories in the order of ``classes``. An object marked
    ``difficult`` becomes ``iscrowd=1``: neither learnt nor counted.

    Args:
        sources: Folders and their splits (see :func:`voc_check`), joined
            into one set.
        classes: The classes, in order.
        one_based: Whether coordinates are indices of pixels that count from
            1, the last inside of the box, as in Pascal VOC itself:
            ``width = xmax - xmin + 1``. Most labelling tools write plain
            coordinates in the same XML: ``width = xmax - xmin``.
        relative_to: Folder that each ``file_name`` is relative to; ``None``
            for the file's own name.
        remedy: Last sentence of every error.

    Raises:
        DataError: As in :func:`voc_check`.
    """
    ids = {name: number for number, name in enumerate(classes, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    done = Conversion(
        {
            'images': images,
            'annotations': annotations,
            'categories': coco_categories(classes),
        }
    )
    for root, split in ((Path(root), split) for root, split in sources):
        for name in _read_voc_split(root, split, remedy):
            image = _read_voc_image(root, name, classes, remedy)
            file = root / 'JPEGImages' / f'{name}.jpg'
            if relative_to is None:
                file_name = file.name
            else:
                file_name = file.relative_to(relative_to).as_posix()
            images.append(coco_image(len(images) + 1, file_name, image))
            for item in image.objects:
                box = _convert_box(name, item, image, one_based, done)
                if box is not None:
                    annotations.append(
                        coco_annotation(
                            len(annotations) + 1,
                            len(images),
                            ids[item.name],
                            box,
                            item.difficult,
                        )
                    )
    return done


def _convert_box(
    name: str,
    item: VocObject,
    image: VocImage,
    one_based: bool,
    done: Conversion,
) -> Box | None:
    x0, y0, x1, y1 = item.box
    box = (x0 - 1, y0 - 1, x1, y1) if one_based else item.box
    clipped = clip_box(box, (0, 0, image.width, image.height))
    note = f'{name} {item.name} {" ".join(f"{v:g}" for v in item.box)}'
    if clipped is None:
        done.dropped.append(note)
    elif clipped != box:
        done.clipped.append(note)
    return clipped


def clip_box(box: Box, region: Box) -> Box | None:
    """The part of a box inside of a region; ``None`` if it has no area."""
    x0, y0 = max(box[0], region[0]), max(box[1], region[1])
    x1, y1 = min(box[2], region[2]), min(box[3], region[3])
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def coco_categories(classes: Sequence[str]) -> list[dict[str, Any]]:
    """The list of ``categories``, with ids from 1."""
    return [
        {'id': number, 'name': name}
        for number, name in enumerate(classes, start=1)
    ]


def coco_image(number: int, file_name: str, size: VocImage) -> dict[str, Any]:
    """One entry of ``images``."""
    return {
        'id': number,
        'file_name': file_name,
        'width': size.width,
        'height': size.height,
    }


def coco_annotation(
    number: int, image: int, category: int, box: Box, crowd: bool = False
) -> dict[str, Any]:
    """One entry of ``annotations``; whole numbers are written as such."""
    x0, y0, x1, y1 = (int(v) if v == int(v) else v for v in box)
    width, height = x1 - x0, y1 - y0
    return {
        'id': number,
        'image_id': image,
        'category_id': category,
        'bbox': [x0, y0, width, height],
        'area': width * height,
        'iscrowd': int(crowd),
    }
