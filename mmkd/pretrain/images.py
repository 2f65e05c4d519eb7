"""The images that are trained on, and the objects that measure progress."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmkd.data import read_json
from mmkd.data.errors import data_error, some
from mmkd.data.layouts import Picture, Reading, read_data
from mmkd.data.layouts.listing import Lookup, images_below
from mmkd.data.layouts.reading import UNREADABLE
from mmkd.errors import DataError

SHOWN = 5
"""So many unreadable images are named."""
OWN_FOLDERS = ('annotations', 'labels')
"""Folders of annotations; the images lie beside them."""


@dataclass(frozen=True)
class Images:
    """Images without labels.

    Attributes:
        files: Their absolute paths, each once, in order.
        source: What they are, for the log.
        unreadable: Those that are left out, each with the reason.
        small: How many are smaller than a crop.
    """

    files: Sequence[str]
    source: str
    unreadable: Sequence[str]
    small: int

    def in_words(self, size: int) -> list[str]:
        """Say in lines what was found, and what is left out."""
        lines = [f'images: {len(self.files):,}, {self.source}']
        if self.unreadable:
            lines.append(
                f'left out: {len(self.unreadable):,} images that cannot be '
                f'read: {some(self.unreadable, SHOWN)}'
            )
        if self.small:
            lines.append(
                f'{self.small:,} images are smaller than the crops of '
                f'{size} x {size}, which enlarge them'
            )
        return lines


def find_images(source: str, size: int) -> Images:
    """Find the images of a folder, a file in COCO's format, or a data layout.

    Of data that have a training split, the others are left out, so that
    nothing is trained on what is tested later. Labels are not read from a
    COCO file, which need not have any. The header of each image is read.

    Args:
        source: The path, or ``coco`` or ``voc``.
        size: The sides of a crop, in pixels.

    Raises:
        DataError: If there are no images, or none that can be read.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == '.json':
        reading, text = _of_file(path)
    else:
        reading, text = _of_folder(source, path)
    splits = {picture.split for picture in reading.pictures.values()}
    kept = [
        picture
        for picture in reading.pictures.values()
        if picture.split == ('train' if 'train' in splits else '')
        or 'train' not in splits
    ]
    if 'train' in splits and len(splits) > 1:
        others = ', '.join(sorted(splits - {'train'}))
        text += f'; its {others} images are left out'
    unreadable = reading.faults.of_images.get(UNREADABLE, [])
    if not kept:
        got = f'{len(unreadable)} that cannot be read: {some(unreadable)}'
        raise data_error(
            path,
            'images',
            got if unreadable else 'none',
            "Give a folder of images, a file in COCO's format, or data in a "
            'common layout.',
        )
    files = dict.fromkeys(os.path.abspath(p.path) for p in kept)
    small = sum(min(p.width, p.height) < size for p in kept)
    return Images(list(files), text, unreadable, small)


def _of_folder(source: str, path: Path) -> tuple[Reading, str]:
    """Read a folder: as a data layout if it is one."""
    try:
        reading = read_data(source)
        if reading.pictures:
            return reading, f'{reading.layout} in {reading.root}'
    except DataError:
        if not path.is_dir():
            raise
    reading = Reading('folder', path)
    for file in images_below(path):
        reading.picture(file, '')
    return reading, f'all that are below {path}'


def _of_file(path: Path) -> tuple[Reading, str]:
    """Read the names in a file in COCO's format."""
    content = read_json(path)
    rows = content.get('images') if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise data_error(
            path,
            "a file in COCO's format, with a list of images",
            'none',
            'Give such a file, or a folder.',
        )
    names = [
        row['file_name']
        for row in rows
        if isinstance(row, dict) and isinstance(row.get('file_name'), str)
    ]
    inner = path.parent.name.lower() in OWN_FOLDERS
    root = path.absolute().parent
    lookup = Lookup(root.parent if inner else root)
    reading = Reading('COCO', lookup.root)
    near = root / path.stem.removeprefix('instances_')
    lost = []
    for name in names:
        file = lookup.find(name, lookup.root / near.name)
        if file is None:
            lost.append(name)
        else:
            reading.picture(file, '')
    if lost:
        raise data_error(
            lookup.root,
            f'every image that {path} names',
            f'{len(lost)} missing: {some(lost)}',
            'Put the images below this folder, or correct the file.',
        )
    return reading, f'those of {path}'


def find_objects(source: str) -> tuple[list[Picture], list[str]]:
    """Find labelled images to measure progress on.

    Args:
        source: A file in COCO's format, or data in a common layout. Of data
            that have a validation split, only that is taken.

    Returns:
        The images with at least one object, and the classes that have any.

    Raises:
        DataError: If there are no such data, or fewer than two classes with
            objects, which cannot be told apart.
    """
    if not Path(source).expanduser().exists():
        read_data(source)  # raises
    reading = read_data(source)
    pictures = [p for p in reading.pictures.values() if p.items]
    splits = {picture.split for picture in pictures}
    if 'val' in splits:
        pictures = [p for p in pictures if p.split == 'val']
    names = {item.name for picture in pictures for item in picture.items}
    classes = [name for name in reading.classes if name in names]
    if len(classes) < 2:
        raise DataError(
            f'--val {source}: expected objects of at least two classes, which '
            f'neighbours can tell apart, got {len(classes)} '
            f'({some(classes) or "no objects"}). Give other annotations, or '
            'leave out --val.'
        )
    return pictures, classes
