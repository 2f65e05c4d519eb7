"""Annotations in the layout of Pascal VOC: read and check them."""

import math
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import VOC_REMEDY, data_error, some
from .files import StrPath, list_folder

Box = tuple[float, float, float, float]
"""``(x0, y0, x1, y1)`` in pixels, ``x1`` and ``y1`` just outside."""


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


def read_voc_split(root: Path, split: str, remedy: str) -> list[str]:
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
        got = f'{len(odd)} other lines: {some(map(repr, odd))}'
        raise data_error(path, 'one image name a line', got, remedy)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        got = f'{len(twice)} more than once: {some(twice)}'
        raise data_error(path, 'each image once', got, remedy)
    for folder, suffix in (('Annotations', '.xml'), ('JPEGImages', '.jpg')):
        files = list_folder(root / folder)
        missing = [n + suffix for n in names if n + suffix not in files]
        if missing:
            expected = f'every file that {path} names'
            got = f'{len(missing)} missing: {some(missing)}'
            raise data_error(root / folder, expected, got, remedy)
    return names


def read_voc_image(
    root: Path, name: str, classes: Sequence[str] | None, remedy: str
) -> VocImage:
    """Annotation of an image, of the given classes only (``None``: any)."""
    path = root / 'Annotations' / f'{name}.xml'
    image = read_voc_xml(path.read_bytes(), path, remedy=remedy)
    if classes is not None:
        unknown = {item.name for item in image.objects} - set(classes)
        if unknown:
            expected = f'objects of the classes {", ".join(classes)}'
            raise data_error(path, expected, some(sorted(unknown)), remedy)
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
    names = read_voc_split(root, split, remedy)
    objects = sum(
        len(read_voc_image(root, name, classes, remedy).objects)
        for name in names
    )
    return {'images': len(names), 'objects': objects}
