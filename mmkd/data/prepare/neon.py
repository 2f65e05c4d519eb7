"""NEON, tree crowns: aerial photos from a Python package, cut into tiles."""

import argparse
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..coco import CocoAnnotations, check_coco_annotations
from ..download import RemoteFile
from ..errors import data_error
from ..files import write_json
from ..voc import read_voc_xml
from .common import say
from .wheel import get_wheel

NEON_PACKAGE = 'deepforest==2.1.0'
NEON_WHEEL = RemoteFile(
    'deepforest-2.1.0-py3-none-any.whl',
    'sha256:8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54',
)
NEON_HELP = f"""\
Tree crowns in aerial photos (1 class; 223 train, 24 val tiles of 256 x 256;
MIT licence), into ROOT/neon: train/, val/, annotations/{{train,val}}.json and
SOURCE.md. The photos come with the package {NEON_PACKAGE}, which pip
downloads and does not install. This needs OpenCV.

    mmkd prepare neon
    mmkd prepare neon --from {NEON_WHEEL.name}
"""
NEON_PHOTOS = {
    'YELL_528': '2019_YELL_2_528000_4978000_image_crop2',
    'YELL_541': '2019_YELL_2_541000_4977000_image_crop',
    'OSBS_029': 'OSBS_029',
    'SOAP_061': 'SOAP_061',
}
"""The name of each photo in its tiles, and its file in the package."""
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

`mmkd prepare neon` cut them into tiles of {TILE} x {TILE} pixels; x and y in
a name are the tile's left and top in its photo. `val` is the lower {VAL_ROWS}
pixels of the YELL photos, in tiles that do not overlap. `train` is all the
rest, in tiles every {STRIDE} pixels, without those that show no tree; no tile
of `train` overlaps one of `val`. A box is clipped to its tile, and kept if at
least {INSIDE:.0%} of its area is inside. Living and dead trees (told apart in
SOAP) are one class.

"""


def prepare_neon(args: argparse.Namespace) -> None:
    target = args.root / 'neon'
    if target.exists():
        say(f'{target}: already there')
    else:
        wheel = get_wheel(NEON_PACKAGE, NEON_WHEEL, args)
        build_neon(wheel, target, NEON_PHOTOS)
        if args.delete_archives and args.source is None:
            wheel.unlink()
    for split in ('train', 'val'):
        found = check_coco_annotations(
            target / 'annotations' / f'{split}.json',
            target / split,
            remedy=f'Remove {target} and run again.',
        )
        counts = f'{found["images"]} tiles, {found["annotations"]} boxes'
        say(f'{target}: {split} has {counts}')


def build_neon(wheel: Path, target: Path, photos: dict[str, str]) -> None:
    """Cut the photos in a wheel into a data set, in one step."""
    partial = target.with_name(f'{target.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    labels = {split: CocoAnnotations(['Tree']) for split in ('train', 'val')}
    try:
        with zipfile.ZipFile(wheel) as packed:
            for name, file in photos.items():
                pixels, boxes = read_photo(packed, file)
                for split, x, y in tile_grid(*pixels.shape[:2]):
                    inside = tile_boxes(boxes, x, y)
                    if not (len(inside) or split == 'val'):
                        continue
                    tile = f'{name}_x{x:04d}_y{y:04d}.png'
                    cut = pixels[y : y + TILE, x : x + TILE]
                    write_png(partial / split / tile, cut)
                    labels[split].add_image(tile, TILE, TILE)
                    for box in inside.tolist():
                        labels[split].add_box('Tree', box)
            licences = [n for n in packed.namelist() if n.endswith('/LICENSE')]
            note = NEON_NOTE.encode() + b'\n'.join(map(packed.read, licences))
    except zipfile.BadZipFile as error:
        got = f'"{error}"'
        raise data_error(wheel, 'a wheel', got, 'Get it again.') from None
    for split, label in labels.items():
        write_json(partial / 'annotations' / f'{split}.json', label.content)
    (partial / 'SOURCE.md').write_bytes(note)
    os.replace(partial, target)


def read_photo(packed: zipfile.ZipFile, name: str) -> tuple[Any, Any]:
    """Return the pixels (height, width, BGR) and boxes (n, 4) of a photo."""
    import cv2
    import numpy as np

    where = f'{packed.filename}: deepforest/data/{name}'
    remedy = f'Give the wheel of {NEON_PACKAGE}.'
    try:
        xml = packed.read(f'deepforest/data/{name}.xml')
        png = packed.read(f'deepforest/data/{name}.png')
    except KeyError:
        expected = 'its .xml and .png'
        raise data_error(where, expected, 'no such file', remedy) from None
    labels = read_voc_xml(xml, f'{where}.xml', remedy=remedy)
    pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    found = 'no image'
    if pixels is not None:
        found = f'{pixels.shape[1]} x {pixels.shape[0]}'
    expected = f'{labels.width} x {labels.height}'
    if found != expected:
        expected += ' pixels, as its .xml says'
        raise data_error(f'{where}.png', expected, found, remedy)
    boxes = np.array([item.box for item in labels.objects])
    return pixels, boxes.reshape(-1, 4)


def tile_grid(height: int, width: int) -> Iterator[tuple[str, int, int]]:
    """Yield the split, left and top of each tile of a photo.

    A photo that is too low for train tiles above its val rows is all train.
    """
    border = height - VAL_ROWS if height >= VAL_ROWS + TILE else height
    for split, rows, step in (
        ('train', range(0, border - TILE + 1, STRIDE), STRIDE),
        ('val', range(border, height - TILE + 1, TILE), TILE),
    ):
        for y in rows:
            for x in range(0, width - TILE + 1, step):
                yield split, x, y


def tile_boxes(boxes: Any, x: int, y: int) -> Any:
    """Return the boxes (n, 4) of a tile, clipped and relative to it."""
    clipped = (boxes - (x, y, x, y)).clip(0, TILE)
    area, whole = (
        (box[:, 2:] - box[:, :2]).prod(1) for box in (clipped, boxes)
    )
    return clipped[(area > 0) & (area >= INSIDE * whole)]


def write_png(path: Path, pixels: Any) -> None:
    import cv2

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode('.png', pixels)[1].tobytes())
