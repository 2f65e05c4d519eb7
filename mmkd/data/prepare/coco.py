"""COCO 2017: downloaded and unpacked, or linked."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..coco import check_coco_annotations
from ..download import RemoteFile
from .common import (
    below,
    existing,
    fetch,
    is_there,
    place,
    refuse_links,
    say,
    unpack,
)

COCO_HELP = """\
COCO 2017, into ROOT/coco: train2017/, val2017/ and
annotations/instances_{train,val}2017.json.

    mmkd prepare coco
    mmkd prepare coco --split val
    mmkd prepare coco --from /datasets/coco
"""
COCO_HOST = 'http://images.cocodataset.org'
COCO_ANNOTATIONS = RemoteFile(
    f'{COCO_HOST}/annotations/annotations_trainval2017.zip',
    'md5:f4bbac642086de4f52a3fdda2de5fa2c',
    252907541,
)
COCO_IMAGES = {
    'train': RemoteFile(
        f'{COCO_HOST}/zips/train2017.zip',
        'md5:cced6f7f71b7629ddf16f17bbcfab6b2',
        19336861798,
    ),
    'val': RemoteFile(
        f'{COCO_HOST}/zips/val2017.zip',
        'md5:442b8da7639aecaf257c1dceb8ba8c80',
        815585330,
    ),
}


def prepare_coco(args: argparse.Namespace) -> None:
    target = args.root / 'coco'
    splits = ['train', 'val'] if args.split == 'all' else [args.split]
    if args.source is not None:
        link_coco(args, target, splits)
    else:
        for split in splits:
            download_coco(args, target, split)
    for split in splits:
        found = check_coco(target, split, f'Remove {target} and run again.')
        say(
            f'{target}: {split} has {found["images"]} images, '
            f'{found["annotations"]} boxes, {found["categories"]} classes'
        )


def coco_paths(root: Path, split: str) -> tuple[Path, Path]:
    """Return the annotation file and the folder of images."""
    labels = root / 'annotations' / f'instances_{split}2017.json'
    return labels, root / f'{split}2017'


def check_coco(root: Path, split: str, remedy: str = '') -> dict[str, int]:
    return check_coco_annotations(*coco_paths(root, split), remedy=remedy)


def link_coco(
    args: argparse.Namespace, target: Path, splits: Sequence[str]
) -> None:
    source = existing(args.source, 'a folder in the layout of COCO')
    remedy = (
        '--from takes a folder with train2017/, val2017/ and annotations/'
        'instances_{train,val}2017.json; --split takes one of the two.'
    )
    for split in splits:
        check_coco(source, split, remedy)
    for split in splits:
        for old, new in zip(
            coco_paths(source, split), coco_paths(target, split), strict=True
        ):
            place(old, new, args)


def download_coco(args: argparse.Namespace, target: Path, split: str) -> None:
    labels, images = coco_paths(target, split)
    if is_there(images, check_coco, target, split):
        return
    refuse_links(target, labels.parent, labels, images)
    if labels.exists():
        check_coco_annotations(labels, remedy='Remove it and run again.')
    else:
        archive = fetch(COCO_ANNOTATIONS, args.root)
        unpack(archive, target, below('annotations/instances_'))
    archive = fetch(COCO_IMAGES[split], args.root)
    unpack(archive, target, below(f'{split}2017/'))
    if args.delete_archives:
        archive.unlink()
