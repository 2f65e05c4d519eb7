"""Each reader of foreign files, what it reads, and what is right."""

import contextlib
import io
import json
import tarfile
import tempfile
import warnings
import xml.dom.minidom
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from mmdet.datasets import CocoDataset
from mmdet.utils import register_all_modules
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmkd.data import (
    check_coco_annotations,
    object_classes,
    voc_check,
    voc_to_coco,
)
from mmkd.data.checkpoint_file import load_checkpoint_file
from mmkd.data.class_names import classes_of
from mmkd.data.coco import read_categories
from mmkd.data.download import extract
from mmkd.data.pictures import pixel_limit, too_large
from mmkd.engine import logs
from mmkd.engine.data_guard import unreadable
from mmkd.errors import MMKDError
from mmkd.report.eval_coco import FIGURES, evaluate, load_results, load_truth
from mmkd.study.study import read_study
from mmkd.teachers.disk_cache import DiskCache

from . import own_data, teachers
from .mutations import DEEP, LONG, as_json

register_all_modules()


@dataclass(frozen=True)
class Reader:
    """How a kind of file is read.

    Attributes:
        name: What the file has to be called.
        read: Reads the file in a folder, and asserts that what it has read
            is right.
        document: Content whose structure is changed, if it has one.
        write: Turns a document into the content of a file.
        files: Further contents, of which only bytes are changed.
    """

    name: str
    read: Callable[[Path], None]
    document: Any = None
    write: Callable[[Any], bytes] = as_json
    files: list[bytes] = field(default_factory=list)

    @property
    def valid(self) -> list[bytes]:
        own = [] if self.document is None else [self.write(self.document)]
        return own + self.files


# ---------------------------------------------------------------------- COCO


def square(size: int = 20) -> np.ndarray:
    mask = np.zeros((100, 120), np.uint8, order='F')
    mask[10 : 10 + size, 30 : 30 + size] = 1
    return mask


def rle(size: int = 20) -> dict[str, Any]:
    found = masks.encode(square(size))
    return {'size': [100, 120], 'counts': found['counts'].decode()}


ANNOTATIONS = {
    'info': {'year': 2026},
    'images': [
        {'id': 5, 'file_name': 'x.jpg', 'width': 120, 'height': 100},
        {'id': 6, 'file_name': 'y.jpg', 'width': 120, 'height': 100},
    ],
    'annotations': [
        {
            'id': number,
            'image_id': 5 + number % 2,
            'category_id': 1 + number % 2,
            'bbox': [30, 10, 20, 20],
            'area': 400,
            'iscrowd': int(number == 3),
            'segmentation': mask,
        }
        for number, mask in enumerate(
            (
                [[30, 10, 50, 10, 50, 30, 30, 30]],
                rle(),
                {'size': [100, 120], 'counts': [3010, 20, 8970]},
            ),
            1,
        )
    ],
    'categories': [
        {'id': 1, 'name': 'cat', 'supercategory': 'animal'},
        {'id': 2, 'name': 'dog', 'supercategory': 'animal'},
    ],
}
RESULTS = [
    {
        'image_id': 5 + number % 2,
        'category_id': 1 + number % 2,
        'bbox': [30, 10, 20, 10 + number],
        'segmentation': rle(10 + number),
        'score': 0.9 - number / 10,
    }
    for number in range(4)
]


def silent(function: Callable[..., Any], *args: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args)


def read_coco(folder: Path) -> None:
    path = folder / 'x.json'
    counts = check_coco_annotations(path)
    content = json.loads(path.read_bytes())
    assert counts == {key: len(content[key]) for key in counts}
    ids = {
        key: {row['id'] for row in content[key]}
        for key in ('images', 'categories')
    }
    for row in content['annotations']:
        assert row['image_id'] in ids['images']
        assert row['category_id'] in ids['categories']
        assert np.isfinite(np.array(row['bbox'], float)).all()
    assert read_categories(path) in (content['categories'], None)
    classes, _ = object_classes(path, content)
    assert len(classes) == len(set(classes))
    if path.read_bytes()[:1] not in (b'{', b' ', b'\n'):
        return  # of UTF-16 and the like, which MMDetection does not read
    # what has passed the check can be trained on
    names = [row['name'] for row in content['categories']]
    built = silent(
        lambda: CocoDataset(
            ann_file=str(path),
            metainfo=dict(classes=tuple(names)),
            data_prefix=dict(img=''),
            pipeline=[],
            serialize_data=False,
            filter_cfg=None,
        )
    )
    assert len(built) == counts['images']
    assert len(classes_of(built) or ()) >= min(len(built.cat_ids), 1)


def read_results(folder: Path, kind: str) -> None:
    truth_path, path = folder / 'truth.json', folder / 'x.json'
    if not truth_path.exists():
        truth_path.write_bytes(as_json(ANNOTATIONS))
    with contextlib.redirect_stderr(io.StringIO()):
        truth = load_truth(truth_path, kind)
        results = load_results(path, truth, kind)
    scores = evaluate(truth, results, kind)
    assert set(scores.figures) == set(FIGURES)
    for value in scores.figures.values():
        assert value is None or 0 <= value <= 1
    if not results:
        assert not any(scores.figures.values())
        return
    # as pycocotools reads the same files by itself
    keys = ('image_id', 'category_id', 'score')
    shape = {'bbox': 'bbox', 'segm': 'segmentation'}[kind]
    rows = [
        {key: row[key] for key in (*keys, shape)}
        for row in json.loads(path.read_bytes())
    ]
    objects = COCO()
    objects.dataset = json.loads(truth_path.read_bytes())

    def reference() -> np.ndarray:
        objects.createIndex()
        evaluator = COCOeval(objects, objects.loadRes(rows), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        return evaluator.stats

    if all(type(row['id']) is int for row in objects.dataset['annotations']):
        expected = [None if v == -1 else v for v in silent(reference).tolist()]
        assert list(scores.figures.values()) == expected


def read_truth(folder: Path) -> None:
    (folder / 'x.json').rename(folder / 'truth.json')
    (folder / 'x.json').write_bytes(as_json(RESULTS))
    for kind in ('bbox', 'segm'):
        with contextlib.suppress(MMKDError):
            read_results(folder, kind)


# ----------------------------------------------------------------------- VOC

VOC = b"""<?xml version="1.0" encoding="utf-8"?>
<annotation><folder>x</folder><filename>a.jpg</filename>
<size><width>120</width><height>100</height><depth>3</depth></size>
<object><name>cat</name><difficult>0</difficult>
<bndbox><xmin>3</xmin><ymin>4.5</ymin><xmax>30</xmax><ymax>40</ymax></bndbox>
</object>
<object><name>dog &amp; co</name><difficult>1</difficult>
<bndbox><xmin>90</xmin><ymin>0</ymin><xmax>130</xmax><ymax>40</ymax></bndbox>
</object></annotation>
"""
ENTITIES = (
    b'<!DOCTYPE a [<!ENTITY a "' + b'x' * 100 + b'">'
    + b''.join(
        b'<!ENTITY %c "%s">' % (98 + n, (b'&%c;' % (97 + n)) * 10)
        for n in range(8)
    )
    + b']>' + VOC.partition(b'?>\n')[2].replace(b'cat', b'&h;')
)  # fmt: skip


def layout(folder: Path) -> None:
    """Complete the layout of VOC around what lies in the folder."""
    for name in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (folder / name).mkdir(parents=True)
    (folder / 'JPEGImages' / 'a.jpg').touch()


def read_voc(folder: Path) -> None:
    layout(folder)
    (folder / 'x.xml').rename(folder / 'Annotations' / 'a.xml')
    (folder / 'ImageSets' / 'Main' / 'train.txt').write_text('a\n')
    counts = voc_check(folder, 'train')
    # in another way, by another reader
    text = (folder / 'Annotations' / 'a.xml').read_bytes()
    document = xml.dom.minidom.parseString(text).documentElement
    objects = [n for n in document.childNodes if n.nodeName == 'object']
    assert counts == {'images': 1, 'objects': len(objects)}
    names = [written(node, 'name') for node in objects]
    converted = voc_to_coco([(folder, 'train')], list(dict.fromkeys(names)))
    (image,) = converted.content['images']
    size = next(n for n in document.childNodes if n.nodeName == 'size')
    assert image['width'] == int(float(written(size, 'width')))
    assert image['height'] == int(float(written(size, 'height')))
    rows = converted.content['annotations']
    assert len(rows) + len(converted.dropped) == len(objects)
    for row in rows:
        x, y, width, height = row['bbox']
        assert 0 <= x < x + width <= image['width']
        assert 0 <= y < y + height <= image['height']


def written(node: Any, name: str) -> str:
    """The text of the first child of this name, up to its first child."""
    child = next(n for n in node.childNodes if n.nodeName == name)
    found = ''
    for part in child.childNodes:
        if part.nodeType in (part.TEXT_NODE, part.CDATA_SECTION_NODE):
            found += part.data
        elif part.nodeType == part.ELEMENT_NODE:
            break
    return found.strip()


def read_voc_list(folder: Path) -> None:
    layout(folder)
    (folder / 'Annotations' / 'a.xml').write_bytes(VOC)
    (folder / 'x.txt').rename(folder / 'ImageSets' / 'Main' / 'train.txt')
    assert voc_check(folder, 'train') == {'images': 1, 'objects': 2}


# ------------------------------------------------------------------- studies

MODEL = "model = dict(type='FasterRCNN')\ntrain_cfg = dict(max_epochs=1)\n"
STUDY = {
    'name': 'tiny',
    'work_dir': 'out',
    'baseline': 'student',
    'seeds': [4],
    'metrics': {'AP': 'coco/bbox_mAP'},
    'data': {'a': {}, 'b': {'train_cfg.max_epochs': 2}},
    'runs': {
        'student': {'config': 'tiny.py', 'options': {'model.type': 'GFL'}},
        'teacher': {'config': 'tiny.py', 'seeds': [7]},
        'kd': {
            'config': 'kd.py',
            'teachers': ['teacher'],
            'each': {'hot': {'train_cfg.max_epochs': 3}},
            'options': {'default_hooks.checkpoint.out_dir': 'out/x'},
        },
        'pair': {'of': 'both', 'ensemble': ['student', 'second']},
        'both': {'config': 'both.py'},
    },
}
LAUGHS = b'a: &a [x, x]\n' + b''.join(
    b'%c: &%c [*%c, *%c, *%c]\n' % (98 + n, 98 + n, *[97 + n] * 3)
    for n in range(20)
)


def as_yaml(document: Any) -> bytes:
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    text = text.replace(f"'{DEEP}'", '[' * 2000 + ']' * 2000)
    text = text.replace(f"'{LONG}'", '9' * 5000)
    return text.encode(errors='surrogatepass')


def read_a_study(folder: Path) -> None:
    teacher = "distillation = dict(teacher=dict(config='tiny.py'))\n"
    peer = "distillation = dict(peers=dict(second=dict(config='tiny.py')))\n"
    (folder / 'tiny.py').write_text(
        MODEL + 'default_hooks = dict(checkpoint=dict(interval=1))\n'
    )
    for name, more in (('kd', teacher), ('both', peer)):
        (folder / f'{name}.py').write_text(
            (folder / 'tiny.py').read_text() + more
        )
    before = sorted(folder.rglob('*'))
    study = read_study(folder / 'x.yaml')
    content = yaml.safe_load((folder / 'x.yaml').read_bytes())
    names = [run.name for run in study.runs]
    assert names
    assert len(names) == len(set(names))
    for run in study.runs:
        assert run.folder.parent == study.work_dir
        assert run.config_file.parent == study.work_dir / 'configs'
        assert run.config.randomness.seed == run.seed
        assert 0 <= run.seed < 2**32
    assert study.runs[-1].config.pretty_text  # what the run is given
    assert {run.network.partition('-')[0] for run in study.runs} <= {
        name.partition('-')[0] for name in content['runs']
    }
    if 'work_dir' not in content:
        expected = folder / 'work_dirs' / 'studies'
        assert study.work_dir.parent == expected.resolve()
    assert sorted(folder.rglob('*')) == before


# --------------------------------------------------------- what training left

ROWS = [
    {'lr': 0.01, 'loss': 1.5, 'step': 1, 'epoch': 1, 'memory': 10},
    {'loss': 1.25, 'step': 2, 'distillation/hint/cosine': 0.5},
    {'coco/bbox_mAP': 0.25, 'coco/bbox_mAP_50': 0.5, 'step': 1},
    {'second/coco/bbox_mAP': 0.25, 'coco/bbox_mAP': 0.3, 'step': 2},
]


def as_lines(rows: Any) -> bytes:
    rows = rows if isinstance(rows, list) else [rows]
    return b'\n'.join(map(as_json, rows)) + b'\n'


def read_logs(folder: Path) -> None:
    place = folder / '20260101' / 'vis_data'
    place.mkdir(parents=True)
    (folder / 'x.json').rename(place / 'scalars.json')
    rows = list(logs.training_rows(folder))
    assert all(isinstance(row, dict) for row in rows)
    for line in logs.by_step(rows).values():
        assert all(type(step) is int for step in line)
        assert all(type(value) in (int, float) for value in line.values())
        assert list(line) == sorted(line)
    for step, metrics in logs.validations(folder).items():
        assert type(step) is int
        assert logs.main_metric(metrics) in metrics
        for value in metrics.values():
            assert type(value) in (int, float)
        assert {'step': step, **metrics}.items() <= max(
            (row for row in rows if step == row.get('step')),
            key=lambda row: len(metrics.items() & pairs(row)),
        ).items()


def pairs(row: dict[str, Any]) -> set[tuple[str, Any]]:
    return {(k, v) for k, v in row.items() if type(v) in (int, float)}


def checkpoint(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


WEIGHTS = {
    'meta': {'epoch': 1, 'classes': ('cat', 'dog')},
    'state_dict': {'a': torch.arange(6.0).reshape(2, 3), 'b': torch.ones(1)},
}


def read_checkpoint(folder: Path) -> None:
    path = folder / 'x.pth'
    found = load_checkpoint_file(str(path))
    assert isinstance(found, dict)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        expected = torch.load(path, weights_only=True)
    if isinstance(expected, dict) and 'state_dict' in expected:
        expected = expected['state_dict']
    if isinstance(expected, dict) and isinstance(found['state_dict'], dict):
        assert list(found['state_dict']) == list(expected)
        for name, value in expected.items():
            if isinstance(value, torch.Tensor) and not value.is_sparse:
                ours = found['state_dict'][name]
                assert torch.equal(ours.nan_to_num(), value.nan_to_num())


def cached() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        cache = DiskCache(folder, 10**6)
        cache.write('key', WEIGHTS['state_dict'])
        (path,) = Path(folder).glob('??/*')
        return path.read_bytes()


def read_cache(folder: Path) -> None:
    content = (folder / 'x.bin').read_bytes()
    (folder / 'cache').mkdir()
    cache = DiskCache(folder / 'cache', 10**6)
    cache.write('key', 1)
    (path,) = (folder / 'cache').glob('??/*')
    path.write_bytes(content)
    found = cache.read('key')
    assert found is None or all(
        torch.equal(found[name], value)
        for name, value in WEIGHTS['state_dict'].items()
    )
    cache.write('key', WEIGHTS['state_dict'])
    assert cache.read('key') is not None


# ------------------------------------------------------ pictures and archives


def picture(kind: str) -> bytes:
    image = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    return cv2.imencode(f'.{kind}', image)[1].tobytes()


def read_picture(folder: Path) -> None:
    """The header may lie, but then either it or the decoder tells."""
    path = folder / 'x.img'
    if too_large(path):
        return
    problem = unreadable(str(path), ValueError())
    if problem is None:
        decoded = cv2.imread(str(path), cv2.IMREAD_COLOR)
        assert decoded is not None
        assert decoded.size <= 3 * pixel_limit()


def archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    members = {'top/a.txt': b'a' * 3000, 'top/sub/b.txt': b'bb'}
    if kind == 'zip':
        with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as packed:
            for name, content in members.items():
                packed.writestr(name, content)
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode=f'w:{kind}') as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo('top/link')
        link.type, link.linkname = tarfile.SYMTYPE, '/etc'
        tar.addfile(link)
    return buffer.getvalue()


def read_archive(folder: Path) -> None:
    out = folder / 'out'
    count = extract(folder / 'x.zip', out)
    found = [path for path in out.rglob('*') if not path.is_dir()]
    assert len(found) == count
    assert not any(path.is_symlink() for path in out.rglob('*'))
    assert sum(path.stat().st_size for path in found) <= 64 << 20
    assert extract(folder / 'x.zip', out) == 0


READERS = {
    'COCO annotations': Reader('x.json', read_coco, ANNOTATIONS),
    'COCO annotations of an evaluation': Reader(
        'x.json', read_truth, ANNOTATIONS
    ),
    'boxes': Reader('x.json', lambda f: read_results(f, 'bbox'), RESULTS),
    'masks': Reader('x.json', lambda f: read_results(f, 'segm'), RESULTS),
    'VOC annotations': Reader('x.xml', read_voc, files=[VOC, ENTITIES]),
    'VOC lists': Reader('x.txt', read_voc_list, files=[b'a\n']),
    'studies': Reader(
        'x.yaml', read_a_study, STUDY, as_yaml, [as_yaml(STUDY) + LAUGHS]
    ),
    'logs': Reader('x.json', read_logs, ROWS, as_lines),
    'checkpoints': Reader(
        'x.pth',
        read_checkpoint,
        WEIGHTS,
        checkpoint,
    ),
    'cache entries': Reader('x.bin', read_cache, files=[cached()]),
    'pictures': Reader(
        'x.img',
        read_picture,
        files=[picture(k) for k in ('png', 'jpg', 'bmp', 'tiff', 'webp')],
    ),
    'archives': Reader(
        'x.zip', read_archive, files=[archive(k) for k in ('zip', '', 'gz')]
    ),
    'YAML files of YOLO': Reader(
        'x.yaml', own_data.read_yolo_yaml, own_data.DATA, as_yaml
    ),
    "Darknet's files": Reader(
        'x.data', own_data.read_darknet, files=[own_data.DARKNET]
    ),
    'labels of YOLO': Reader(
        'x.txt', own_data.read_yolo_labels, files=[own_data.LABELS]
    ),
    'COCO files of other tools': Reader(
        'x.json', own_data.read_own_coco, own_data.ANNOTATIONS
    ),
    'VOC annotations without lists': Reader(
        'x.xml', own_data.read_loose_voc, files=[VOC, ENTITIES]
    ),
    'tables of boxes': Reader(
        'x.csv',
        own_data.read_table,
        [own_data.HEAD, *own_data.ROWS],
        own_data.as_csv,
    ),
    'detections of a teacher': Reader(
        'x.json',
        teachers.read_detections,
        ANNOTATIONS
        | dict(
            annotations=[
                row | dict(score=0.5) for row in ANNOTATIONS['annotations']
            ]
        ),
    ),
    'detectors in ONNX': Reader(
        'x.onnx', teachers.read_onnx, files=[teachers.onnx_detector()]
    ),
}
