"""Annotations in the layout of Pascal VOC: check them, convert them to COCO.

Supervision reads this layout as well, but it ignores ``difficult`` and the
lists of splits, takes an image without a file for one without objects, always
counts pixels from 1, and opens every image.
"""

import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from .coco import Box, CocoAnnotations
from .errors import VOC_REMEDY, data_error, some
from .files import StrPath, check_files, is_number, read_bytes, shown

LARGEST = 1 << 24
"""Bytes of an annotation; VOC's own have less than 10,000."""


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
        text: The content of the file.
        where: The name of the file, for errors.
        remedy: The last sentence of every error.

    Raises:
        DataError: The XML is malformed, or lacks a size, a name, or a box
            of four finite numbers.
    """
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        # the latter two for an encoding that Python or expat does not know
        got = f'malformed XML ({error})' if text.strip() else 'an empty file'
        raise data_error(where, 'a VOC annotation', got, remedy) from None
    width, height = (
        _number(root, f'size/{key}', where, remedy)
        for key in ('width', 'height')
    )
    if width < 1 or height < 1:
        got = f'{width:g} x {height:g}'
        raise data_error(where, 'the size of the image', got, remedy)
    objects = []
    for node in root.findall('object'):
        name = (node.findtext('name') or '').strip()
        if not name:
            expected = 'a <name> in each <object>'
            raise data_error(where, expected, 'none', remedy)
        x0, y0, x1, y1 = (
            _number(node, f'bndbox/{key}', where, remedy)
            for key in ('xmin', 'ymin', 'xmax', 'ymax')
        )
        difficult = (node.findtext('difficult') or '0').strip() == '1'
        objects.append(VocObject(name, (x0, y0, x1, y1), difficult))
    return VocImage(int(width), int(height), tuple(objects))


def read_voc_file(path: Path, *, remedy: str = VOC_REMEDY) -> VocImage:
    """Read an annotation file; see :func:`read_voc_xml`."""
    text = read_bytes(path, LARGEST, 'a VOC annotation', remedy)
    return read_voc_xml(text, path, remedy=remedy)


def _number(
    node: ElementTree.Element, path: str, where: object, remedy: str
) -> float:
    text = node.findtext(path)
    try:
        value = float(text or '')
    except ValueError:
        value = float('nan')
    if not is_number(value):
        got = 'none' if text is None else shown(text)
        raise data_error(where, f'a number in <{path}>', got, remedy)
    return value


def read_voc_split(
    root: Path, split: str, classes: Sequence[str] | None, remedy: str
) -> Iterator[tuple[str, VocImage]]:
    """Yield the name and the annotation of each image of a split."""
    path = root / 'ImageSets' / 'Main' / f'{split}.txt'
    if not path.is_file():
        raise data_error(path, 'the list of a split', 'nothing', remedy)
    text = path.read_text(encoding='utf-8', errors='replace')
    names = [line.strip() for line in text.split('\n') if line.strip()]
    odd = [name for name in names if len(name.split()) > 1]
    twice = [name for name, count in Counter(names).items() if count > 1]
    out = [n for n in names if PurePath(n).is_absolute() or '..' in n]
    for wrong, got in (
        (not names, 'an empty file'),
        (text.startswith('\ufeff'), 'a byte order mark before them'),
        (out, f'{len(out)} that lead out of the folder: {some(out)}'),
        (odd, f'{len(odd)} other lines: {some(map(repr, odd))}'),
        (twice, f'{len(twice)} more than once: {some(twice)}'),
    ):
        if wrong:
            raise data_error(path, 'one image name per line', got, remedy)
    for folder, suffix in (('Annotations', 'xml'), ('JPEGImages', 'jpg')):
        files = (f'{name}.{suffix}' for name in names)
        check_files(root / folder, files, path, remedy)
    for name in names:
        file = root / 'Annotations' / f'{name}.xml'
        image = read_voc_file(file, remedy=remedy)
        unknown = {item.name for item in image.objects} - set(classes or ())
        if classes is not None and unknown:
            expected = f'objects of the classes {", ".join(classes)}'
            raise data_error(file, expected, some(sorted(unknown)), remedy)
        yield name, image


def voc_check(
    root: StrPath,
    split: str,
    *,
    classes: Sequence[str] | None = None,
    remedy: str = VOC_REMEDY,
) -> dict[str, int]:
    """Check one split of a folder in the layout of Pascal VOC.

    Args:
        root: A folder with ``Annotations``, ``JPEGImages`` and
            ``ImageSets/Main``, such as ``data/VOCdevkit/VOC2007``.
        split: The name of a list in ``ImageSets/Main``, such as ``trainval``.
        classes: The classes that are allowed; ``None`` allows any.
        remedy: The last sentence of every error.

    Returns:
        How many ``images`` and ``objects`` there are.

    Raises:
        DataError: The list is missing, empty or of another format, a file
            that it names does not exist, an annotation is malformed, or its
            class is unknown.
    """
    images = list(read_voc_split(Path(root), split, classes, remedy))
    objects = sum(len(image.objects) for _, image in images)
    return {'images': len(images), 'objects': objects}


def voc_to_coco(
    sources: Sequence[tuple[StrPath, str]],
    classes: Sequence[str],
    *,
    one_based: bool = False,
    relative_to: StrPath | None = None,
    remedy: str = VOC_REMEDY,
) -> CocoAnnotations:
    """Convert splits in the layout of Pascal VOC to COCO annotations.

    Images have the order of the lists. Boxes are clipped to the image, and
    those without area are dropped; the result names both. An object marked
    ``difficult`` becomes ``iscrowd=1``: it is neither learnt nor counted.

    Args:
        sources: Folders and their splits (see :func:`voc_check`), joined
            into one set.
        classes: The classes, in order.
        one_based: Whether coordinates are indices of pixels that count from
            1, the last one inside of the box, as in Pascal VOC itself:
            ``width = xmax - xmin + 1``. Most labelling tools write plain
            coordinates in the same XML: ``width = xmax - xmin``.
        relative_to: The folder that each ``file_name`` is relative to; with
            ``None`` it is the file's own name.
        remedy: The last sentence of every error.

    Raises:
        DataError: As in :func:`voc_check`.
    """
    done = CocoAnnotations(classes)
    for root, split in sources:
        for name, image in read_voc_split(Path(root), split, classes, remedy):
            file = Path(root) / 'JPEGImages' / f'{name}.jpg'
            base = file.parent if relative_to is None else relative_to
            file_name = file.relative_to(base).as_posix()
            done.add_image(file_name, image.width, image.height)
            for item in image.objects:
                x0, y0, x1, y1 = item.box
                box = (x0 - one_based, y0 - one_based, x1, y1)
                written = ' '.join(f'{value:g}' for value in item.box)
                note = f'{name} {item.name} {written}'
                done.add_box(item.name, box, crowd=item.difficult, note=note)
    return done
