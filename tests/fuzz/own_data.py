"""Users' data in the layouts that ``mmkd distill --data`` takes."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from mmkd.data.layouts import find_data
from tests.helpers.own_data import CLASSES, coco, draw, photos, xml, yolo

from .mutations import as_text

PHOTOS = photos(6, boxes=2)
SPLITS = {'train': list(PHOTOS)[:4], 'valid': list(PHOTOS)[4:]}
FIRST = SPLITS['train'][0]


def draw_photos(root: Path, folder: str) -> None:
    """Write each photo to the folder of its split."""
    for split, names in SPLITS.items():
        for name in names:
            draw(root / folder.format(split) / f'{name}.jpg', PHOTOS[name][0])


def convert(root: Path) -> int:
    """Find and convert the data; read what was written by COCO's API.

    Args:
        root: The folder, in the current one.

    Returns:
        The number of objects.
    """
    data = find_data(str(root))
    count = 0
    for entry in filter(None, (data.train, data.val, data.test)):
        path = Path(entry['data_root'], entry['ann_file'])
        with contextlib.redirect_stdout(None):
            api = COCO(str(path))
        assert {row['name'] for row in api.cats.values()} >= set(data.classes)
        for row in api.anns.values():
            assert row['image_id'] in api.imgs
            assert row['category_id'] in api.cats
            assert len(row['bbox']) == 4
            assert all(map(math.isfinite, row['bbox'])), row
        for row in api.imgs.values():
            folder = Path(entry['data_root'], entry['data_prefix']['img'])
            assert (folder / row['file_name']).is_file()
        count += len(api.anns)
    return count


# ---------------------------------------------------------------------- YOLO

DATA = {
    'path': '.',
    'train': 'train/images',
    'val': ['valid/images'],
    'nc': 3,
    'names': list(CLASSES),
}
DARKNET = b'classes = 3\ntrain = train.txt\nvalid=x.txt\nnames = obj.names\n'
LABELS = b''.join(
    (yolo(*PHOTOS[FIRST]) + line + '\n').encode()
    for line in (
        '2 0.25 0.25 0.75 0.25 0.75 0.5',
        '0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5',
        '1 0.5 0.5 0.25 0.25 0.875',
    )
)


def write_labels(root: Path, folder: str) -> int:
    """Write all label files; return how many lines they have."""
    for split, names in SPLITS.items():
        (root / folder.format(split)).mkdir(parents=True, exist_ok=True)
        for name in names:
            path = root / folder.format(split) / f'{name}.txt'
            path.write_text(yolo(*PHOTOS[name]))
    return sum(len(objects) for _, objects in PHOTOS.values())


def read_yolo_yaml(folder: Path) -> None:
    root = folder / 'set'
    draw_photos(root, '{}/images')
    lines = write_labels(root, '{}/labels')
    (folder / 'x.yaml').rename(root / 'data.yaml')
    assert convert(root) <= lines


def read_darknet(folder: Path) -> None:
    root = folder / 'set'
    draw_photos(root, 'obj')
    lines = write_labels(root, 'obj')
    for split, names in SPLITS.items():
        path = root / {'train': 'train.txt', 'valid': 'x.txt'}[split]
        path.write_text(''.join(f'obj/{name}.jpg\n' for name in names))
    (root / 'obj.names').write_text('\n'.join(CLASSES))
    (folder / 'x.data').rename(root / 'obj.data')
    assert convert(root) <= lines


def read_yolo_labels(folder: Path) -> None:
    root = folder / 'set'
    draw_photos(root, 'images/{}')
    lines = write_labels(root, 'labels/{}') - len(PHOTOS[FIRST][1])
    (root / 'data.yaml').write_text(json.dumps({'names': list(CLASSES)}))
    path = root / 'labels/train' / f'{FIRST}.txt'
    (folder / 'x.txt').replace(path)
    text = path.read_bytes().decode('utf-8-sig', errors='replace')
    own = [line.split() for line in text.splitlines() if line.strip()]
    found = convert(root) - lines
    assert sum(map(is_box, own)) <= found <= len(own)


def is_box(words: list[str]) -> bool:
    """Whether a line is a plain box of a class that has a name."""
    if len(words) != 5:
        return False
    try:
        values = [float(word) for word in words]
    except ValueError:
        return False
    return values[0] in (0, 1, 2) and all(abs(v) < 1e9 for v in values)


# ------------------------------------------------------------ COCO, VOC, CSV

ANNOTATIONS = coco({f'{name}.jpg': photo for name, photo in PHOTOS.items()})
ROWS = [
    [f'{name}.jpg', str(size[0]), str(size[1]), kind, *map(str, box)]
    for name, (size, objects) in PHOTOS.items()
    for kind, box in objects
]
HEAD = ['filename', 'width', 'height', 'class', 'xmin', 'ymin', 'xmax', 'ymax']


def read_own_coco(folder: Path) -> None:
    root = folder / 'set'
    draw_photos(root, 'pictures')
    (folder / 'x.json').rename(root / 'export.json')
    count = convert(root)
    rows = json.loads((root / 'export.json').read_bytes())['annotations']
    assert count <= len(rows)


def read_loose_voc(folder: Path) -> None:
    root = folder / 'set'
    draw_photos(root, '.')
    for name, photo in PHOTOS.items():
        (root / f'{name}.xml').write_text(xml(*photo))
    path = root / f'{FIRST}.xml'
    (folder / 'x.xml').replace(path)
    own = path.read_bytes().count(b'<object')
    others = sum(len(objects) for _, objects in PHOTOS.values())
    assert convert(root) <= others + own


def as_csv(rows: Any) -> bytes:
    def cells(row: Any) -> str:
        if not isinstance(row, list):
            return as_text(row)
        return ','.join(map(as_text, row))

    lines = map(cells, rows if isinstance(rows, list) else [rows])
    return '\n'.join(lines).encode(errors='surrogatepass')


def read_table(folder: Path) -> None:
    root = folder / 'set'
    draw_photos(root, 'pictures')
    (folder / 'x.csv').rename(root / 'boxes.csv')
    text = (root / 'boxes.csv').read_bytes().decode('latin-1')
    assert convert(root) <= len(text.splitlines())
