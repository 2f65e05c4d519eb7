"""Pascal VOC 2007 and 2012: downloaded or linked, and converted."""

import argparse
from pathlib import Path

from ..download import RemoteFile, verify
from ..errors import data_error
from ..voc import voc_check, voc_to_coco
from .common import (
    below,
    existing,
    fetch,
    is_there,
    place,
    refuse_links,
    unpack,
    write_converted,
)

VOC_HELP = """\
Pascal VOC, into ROOT/VOCdevkit: VOC2007/ and VOC2012/, and in annotations/
the same as COCO JSON (voc0712_trainval, voc07_test, ...), with file names
relative to ROOT/VOCdevkit. Objects marked difficult become iscrowd=1.

    mmkd prepare voc
    mmkd prepare voc --from /datasets/VOCdevkit
    mmkd prepare voc --parts 07-trainval 07-test \\
        --from VOCtrainval_06-Nov-2007.tar VOCtest_06-Nov-2007.tar
"""
VOC_HOST = 'http://host.robots.ox.ac.uk/pascal/VOC'
VOC_CLASSES = (
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat',
    'chair', 'cow', 'diningtable', 'dog', 'horse', 'motorbike', 'person',
    'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor',
)  # fmt: skip
VOC_PARTS = {
    '07-trainval': RemoteFile(
        f'{VOC_HOST}/voc2007/VOCtrainval_06-Nov-2007.tar',
        'md5:c52e279531787c972589f7e41ab4ae64',
        460032000,
    ),
    '07-test': RemoteFile(
        f'{VOC_HOST}/voc2007/VOCtest_06-Nov-2007.tar',
        'md5:b6e924de25625d8de591ea690078ad9f',
        451020800,
    ),
    '12-trainval': RemoteFile(
        f'{VOC_HOST}/voc2012/VOCtrainval_11-May-2012.tar',
        'md5:6cd6e144f989b92b3379bac3b3de84fd',
        1999639040,
    ),
}
VOC_SETS = {
    'voc07_trainval': ('07-trainval',),
    'voc07_test': ('07-test',),
    'voc12_trainval': ('12-trainval',),
    'voc0712_trainval': ('07-trainval', '12-trainval'),
}
"""Annotation files, named as in mmdet's `*_voc0712-cocofmt` configs."""


def prepare_voc(args: argparse.Namespace) -> None:
    target = args.root / 'VOCdevkit'
    for path in args.source:
        existing(path, 'a folder or a tar of VOC')
        if path.is_dir():
            link_voc(args, path, target)
    for part in args.parts:
        folder, split = voc_part(target, part)
        if not is_there(f'{folder}, {split}', check, folder, split):
            refuse_links(target, folder)
            unpack_voc(args, part)
    for name, parts in VOC_SETS.items():
        if set(parts) <= set(args.parts):
            converted = voc_to_coco(
                [voc_part(target, part) for part in parts],
                VOC_CLASSES,
                one_based=True,
                relative_to=target,
            )
            write_converted(target / 'annotations' / f'{name}.json', converted)


def check(folder: Path, split: str, remedy: str = '') -> None:
    voc_check(folder, split, classes=VOC_CLASSES, remedy=remedy)


def voc_part(devkit: Path, part: str) -> tuple[Path, str]:
    """Return the folder and the split of a part."""
    year, _, split = part.partition('-')
    return devkit / f'VOC20{year}', split


def link_voc(args: argparse.Namespace, source: Path, target: Path) -> None:
    if (source / 'VOCdevkit').is_dir():
        source = source / 'VOCdevkit'
    parts = [voc_part(source, part) for part in args.parts]
    parts = [(folder, split) for folder, split in parts if folder.is_dir()]
    if not parts:
        expected = 'VOC2007 or VOC2012 in it'
        raise data_error(source, expected, 'neither', 'Check --from.')
    for folder, split in parts:
        check(folder, split, 'Ask for other --parts, or complete this folder.')
    for folder in dict.fromkeys(folder for folder, _ in parts):
        place(folder, target / folder.name, args)


def unpack_voc(args: argparse.Namespace, part: str) -> None:
    archive = VOC_PARTS[part]
    local = [path for path in args.source if path.name == archive.name]
    if args.source and not local:
        given = ', '.join(str(path) for path in args.source)
        folder, split = voc_part(Path(), part)
        expected = f'{archive.name}, or a folder with {folder} and {split}'
        remedy = 'Give it too, or ask for other --parts.'
        raise data_error(given, expected, 'neither', remedy)
    if local:
        tar = local[0]
        verify(tar, archive, remedy='Get this file again.')
    else:
        tar = fetch(archive, args.root)
    unpack(tar, args.root, below('VOCdevkit/'))
    if args.delete_archives and not local:
        tar.unlink()
