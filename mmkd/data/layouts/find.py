"""Find the layout of a folder, or say what is there instead."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from mmkd.errors import DataError

from ..errors import data_error, some
from .coco import Coco, coco_of_file, find_coco
from .convert import Options, convert, folder_for
from .data import FOLDERS, Data
from .explain import explain, explain_file
from .listing import ALIASES, folders_in, is_hidden, suffix_of
from .reading import Reading, Source
from .table import find_table, table_of_file
from .voc import find_voc_files, find_voc_lists
from .yolo import find_yolo_file, find_yolo_folder, yolo_of_file

Finder = Callable[[Path], Source | None]
CERTAIN: tuple[Finder, ...] = (
    find_voc_lists, find_coco, find_yolo_file, find_table
)  # fmt: skip
"""Layouts with a file that describes them."""
LOOSE: tuple[Finder, ...] = (find_yolo_folder, find_voc_files)
"""Layouts that are recognised by the labels, wherever they are."""

PARTS = ('images', 'labels', 'annotations', 'jpegimages', 'imagesets')
"""Folders that are a part of a layout, and not around one."""


def find_data(name: str) -> Data:
    """The data of ``coco``, ``voc``, or a path to data in a common layout.

    COCO's layout with training and validation data, and Pascal VOC's with
    ``ImageSets/Main``, are read as they stand. Other COCO files (Roboflow,
    CVAT, Label Studio), VOC's XML without lists, YOLO and tables of boxes are
    converted: annotations in COCO's format are written to ``data/NAME``, and
    the images stay where they are.

    Args:
        name: The folder, or the YAML, JSON or CSV file that describes it.

    Raises:
        DataError: If there are no such data, or hardly any can be used.
    """
    path = _path(name)
    found = _find(path, name)
    if data := found.as_it_stands():
        return _told(data, found)
    path, found, out = _origin(_whole(path, found), found)
    out = out or folder_for(path, found.root)
    return _told(convert(found.read(), path, out), found)


def prepare(
    name: str, out: Path | None, options: Options
) -> tuple[Data, Path]:
    """Convert data in a common layout to COCO's format.

    Args:
        name: See :func:`find_data`.
        out: The folder of the annotations, by default as in
            :func:`find_data`.
        options: How to split, and which classes. With none of them and
            without ``out``, what MMDetection reads as it stands is not
            converted.

    Returns:
        The data, and the path under which :func:`find_data` finds them.
    """
    path = _path(name)
    found = _find(path, name)
    plain = out is None and options == Options()
    if plain and (data := found.as_it_stands()):
        return _told(data, found), path
    path, found, kept = _origin(_whole(path, found), found)
    if out is not None:
        kept = Path(os.path.abspath(out))
        if kept == found.root:
            raise data_error(
                kept,
                'another folder than that of the data',
                'the same',
                'Give another one with --out.',
            )
    folder = kept or folder_for(path, found.root)
    data = convert(found.read(), path, folder, options)
    return _told(data, found), folder


def read_data(name: str) -> Reading:
    """Read the images and objects of data in a common layout.

    Nothing is written, and the classes need not be the same in all splits.

    Args:
        name: See :func:`find_data`.

    Raises:
        DataError: If there are no such data.
    """
    return _find(_path(name), name).read()


def _whole(path: Path, found: Source) -> Path:
    """The folder instead of a file in it, where that stands for the same."""
    if os.path.isfile(path):
        with suppress(DataError):
            whole = _find(found.root)
            if whole.files_read() == found.files_read():
                return found.root
    return path


def _origin(path: Path, found: Source) -> tuple[Path, Source, Path | None]:
    """What a folder was converted from, if it was and that is still there.

    Returns:
        The path of the data, what was found there, and the folder.
    """
    origin = found.origin() if isinstance(found, Coco) else {}
    if not origin or not os.path.exists(origin['source']):
        return path, found, None
    source = Path(origin['source'])
    return source, _find(source), found.root


def _told(data: Data, found: Source) -> Data:
    """Say which other data are there."""
    if found.beside:
        layout, *others = data.summary
        names = some(path.name for path in found.beside)
        data.summary = (f'{layout}; not read: {names}', *others)
    return data


def _path(name: str) -> Path:
    known = FOLDERS.get(name, '')
    if os.path.exists(known) or not os.path.exists(name):
        name = known or name
    return Path(os.path.abspath(os.path.expanduser(name)))


def _find(path: Path, name: str = '') -> Source:
    """Find the layout of a path.

    Raises:
        DataError: If it has none that is known; says what is there.
    """
    if not os.path.exists(path):
        remedy = 'Check the path.'
        if name in FOLDERS:
            remedy = f'Run `mmkd prepare {name}`, or give a path.'
        near = path
        while not os.path.exists(near):
            near = near.parent
        there = (
            f'nothing ({near} exists)' if near != path.parent else ('nothing')
        )
        raise data_error(path, 'a folder of data', there, remedy)
    try:
        if not os.path.isdir(path):
            return _find_file(path)
        inner = _unwrapped(path)
        for finders in (CERTAIN, LOOSE):
            if found := _first(finders, inner):
                return found
            folders = folders_in(inner)
            every = {f: each for f in folders if (each := _first(finders, f))}
            if every:
                first, *others = every
                every[first].beside = others
                return every[first]
        raise explain(path, name)
    except PermissionError as error:
        got = f'"{error.strerror}" ({error.filename})'
        remedy = 'Give yourself the rights to it.'
        raise data_error(path, 'data that can be read', got, remedy) from None


def _first(finders: Sequence[Finder], folder: Path) -> Source | None:
    return next((found for find in finders if (found := find(folder))), None)


def _unwrapped(folder: Path) -> Path:
    """Go into folders that hold nothing but a folder, as of an archive."""
    for _ in range(5):
        inner = [p for p in folder.iterdir() if not is_hidden(p.name)]
        if len(inner) != 1 or not inner[0].is_dir():
            return folder
        if inner[0].name.lower() in (*ALIASES, *PARTS):
            return folder
        folder = inner[0]
    return folder


def _find_file(path: Path) -> Source:
    suffix = suffix_of(path.name)
    if suffix in ('.yaml', '.yml', '.data'):
        if found := yolo_of_file(path):
            return found
        raise data_error(
            path,
            'names of classes and paths of images (names, train, val)',
            'none of them',
            'Give the data.yaml of YOLO, or a folder.',
        )
    if suffix == '.json':
        return coco_of_file(path)
    if suffix in ('.csv', '.tsv'):
        return table_of_file(path)
    raise explain_file(path)
