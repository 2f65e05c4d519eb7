"""BCCD, blood cells: downloaded or linked, and converted."""

import argparse
from pathlib import Path

from ..download import RemoteFile
from ..voc import voc_check, voc_to_coco
from .common import (
    copy,
    existing,
    fetch,
    is_there,
    place,
    refuse_links,
    unpack,
    write_converted,
)

BCCD_HELP = """\
BCCD, microscope photos of blood cells (3 classes; 205 train, 87 val, 72 test
photos; MIT licence), into ROOT/bccd: BCCD/ in the layout of VOC and
annotations/{train,val,test}.json.

    mmkd prepare bccd
    mmkd prepare bccd --from /datasets/bccd
"""
BCCD_ARCHIVE = RemoteFile(
    'https://github.com/Shenggan/BCCD_Dataset/archive/refs/heads/master.zip'
)
BCCD_CLASSES = ('RBC', 'WBC', 'Platelets')
BCCD_SPLITS = ('train', 'val', 'test')


def prepare_bccd(args: argparse.Namespace) -> None:
    target = args.root / 'bccd'
    folder = target / 'BCCD'
    if args.source is not None:
        existing(args.source, 'a folder with BCCD/ in it, or its zip')
    if args.source is not None and args.source.is_dir():
        link_bccd(args, folder)
    elif not is_there(folder, check_bccd, folder):
        refuse_links(target, folder)
        archive = args.source or fetch(BCCD_ARCHIVE, args.root)
        unpack(archive, target, select)
        check_bccd(folder, f'Remove {archive} and get it again.')
        if args.delete_archives and args.source is None:
            archive.unlink()
    for split in BCCD_SPLITS:
        # LabelImg wrote plain coordinates, not VOC's indices of pixels.
        converted = voc_to_coco([(folder, split)], BCCD_CLASSES)
        write_converted(target / 'annotations' / f'{split}.json', converted)


def check_bccd(folder: Path, remedy: str = '') -> None:
    for split in BCCD_SPLITS:
        voc_check(folder, split, classes=BCCD_CLASSES, remedy=remedy)


def link_bccd(args: argparse.Namespace, folder: Path) -> None:
    source = args.source
    if (source / 'BCCD').is_dir():
        source = source / 'BCCD'
    check_bccd(source, '--from takes a folder with BCCD/ in it.')
    place(source, folder, args)
    licence = source.parent / 'LICENSE'
    if licence.is_file() and not (folder.parent / 'LICENSE').exists():
        copy(licence, folder.parent / 'LICENSE')


def select(name: str) -> str | None:
    inner = name.partition('/')[2]  # below BCCD_Dataset-master/
    wanted = inner == 'LICENSE' or inner.startswith('BCCD/')
    return inner if wanted else None
