"""A teacher that is an ONNX file."""

import sys

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmdet.datasets import CocoDataset

from mmkd.data import read_json
from mmkd.detectors.graph import detector_graph
from mmkd.errors import ConfigError, PackageError
from mmkd.export.canvas import Canvas
from mmkd.export.check import detect as by_torch
from mmkd.export.command import describe, finish
from mmkd.report.eval_coco import evaluate, load_truth
from mmkd.teachers.build import build_teacher, changed
from mmkd.teachers.foreign import read_image
from mmkd.teachers.view import TeacherContext
from tests.helpers import onnx_files, toy
from tests.helpers import tiny_detectors as tiny
from tests.helpers.lively import lively, photos
from tests.helpers.teaching import ReadBoxes

ALONE = TeacherContext(None, (), named=False)
COCO = CocoDataset.METAINFO['classes']


def detector(file, **options):
    cfg = dict(type='mmkd.OnnxDetector', file=str(file), **options)
    return build_teacher(cfg, ALONE)


def grey(value, height=64, width=64):
    return np.full((height, width, 3), value, np.uint8)


def test_each_image_of_a_batch_gets_its_own(tmp_path):
    """The file takes any number of images; the box depends on brightness."""
    file = onnx_files.brightness(tmp_path / 'a.onnx')
    teacher = detector(file, classes=['thing'], resize='stretch')
    images = [grey(value) for value in range(50, 250, 10)]  # more than 16
    found = teacher.detect(images, ['x'] * len(images))
    for image, each in zip(images, found, strict=True):
        m = image.mean() / 255
        expected = [[30 * m, 25 * m, 50 * m, 35 * m]]
        np.testing.assert_allclose(each.boxes, expected, rtol=1e-4)
        np.testing.assert_allclose(each.scores, [m], rtol=1e-4)


@pytest.mark.parametrize('fixed', [1, 3])
def test_a_batch_of_a_fixed_size_is_filled(tmp_path, fixed):
    file = onnx_files.brightness(tmp_path / 'a.onnx', (fixed, 3, 64, 64))
    teacher = detector(file, classes=['thing'])
    images = [grey(value) for value in (60, 120, 180, 240)]
    found = teacher.detect(images, ['x'] * 4)
    scores = [float(each.scores[0]) * 255 for each in found]
    np.testing.assert_allclose(scores, [60, 120, 180, 240], 1e-4)


def test_boxes_are_in_pixels_of_the_picture_and_within_it(tmp_path):
    """A picture of 32 x 128 fills 16 lines of an input of 64 x 64."""
    box = np.array([[[32, 32, 20, 8, 0.9], [4, 30, 20, 40, 0.8]]], np.float32)
    outputs = dict(o=np.ascontiguousarray(box.transpose(0, 2, 1)))
    file = onnx_files.constant(tmp_path / 'a.onnx', outputs)
    teacher = detector(file, classes=['thing'], nms_iou=1.0)
    found = teacher.detect([grey(0, 32, 128)], ['x'])[0]
    # x in the input is doubled; y begins at 24: (32 - 4 - 24) * 2 = 8.
    assert found.boxes.tolist() == [[44, 8, 84, 24], [0, 0, 28, 32]]


def test_channels_are_in_the_order_that_is_asked_for(tmp_path):
    """Only the input's first channel is bright."""
    file = onnx_files.brightness(tmp_path / 'a.onnx', weights=(3, 0, 0))
    image = grey(0)
    image[..., 0] = 200  # red
    for to_rgb, expected in ((True, [200 / 255]), (False, [])):
        teacher = detector(file, classes=['thing'], to_rgb=to_rgb)
        scores = teacher.detect([image], ['x'])[0].scores
        np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_half_precision_and_bytes(tmp_path):
    box = np.array([[[32, 32, 20, 8, 0.5, 0]]], np.float32)
    for kind in (onnx.TensorProto.FLOAT16, onnx.TensorProto.UINT8):
        file = onnx_files.constant(
            tmp_path / f'{kind}.onnx', dict(o=box), kind=kind
        )
        teacher = detector(file, classes=['a', 'b'])
        std = 1 if kind == onnx.TensorProto.UINT8 else 255
        assert teacher._preprocess.std.tolist() == [std] * 3
        assert len(teacher.detect([grey(9)], ['x'])[0].scores) == 1


def test_classes_that_the_file_names(tmp_path):
    """As Ultralytics writes them; numbers need not be in order."""
    file = onnx_files.brightness(tmp_path / 'a.onnx')
    with pytest.raises(ConfigError, match='does not name its classes'):
        detector(file)
    model = onnx.load(file)
    onnx.helper.set_model_props(model, dict(names="{0: 'bird'}", stride='32'))
    onnx.save(model, file)
    assert detector(file).classes == ('bird',)


def test_the_identity_is_that_of_model_and_options(tmp_path):
    first = onnx_files.brightness(tmp_path / 'a.onnx')
    same = onnx_files.brightness(tmp_path / 'b.onnx')
    other = onnx_files.brightness(tmp_path / 'c.onnx', weights=(1, 2, 1))
    base = detector(first, classes=['a']).identity
    assert detector(same, classes=['a']).identity == base
    changed = [
        detector(other, classes=['a']),
        detector(first, classes=['b']),
        detector(first, classes=['a'], resize='fit'),
        detector(first, classes=['a'], pad_value=0),
        detector(first, classes=['a'], score_thr=0.1),
        detector(first, classes=['a'], std=[1, 1, 1]),
    ]
    assert len({base, *(each.identity for each in changed)}) == 7


# --------------------------------------------------------------- what is wrong


def test_a_size_that_is_open_or_other(tmp_path):
    file = onnx_files.brightness(tmp_path / 'a.onnx', ('B', 3, 'H', 'W'))
    with pytest.raises(ConfigError, match='leaves the size of its images op'):
        detector(file, classes=['a'])
    teacher = detector(file, classes=['a'], size=[32, 96])
    assert teacher.detect([grey(255, 8, 24)], ['x'])[0].scores[0] > 0.99
    assert detector(file, classes=['a'], size=32)._preprocess.size == (32, 32)
    fixed = onnx_files.brightness(tmp_path / 'b.onnx')
    with pytest.raises(ConfigError, match=r'takes images of 64 x 64'):
        detector(fixed, classes=['a'], size=128)
    with pytest.raises(ConfigError, match='size must be a height and a wid'):
        detector(file, classes=['a'], size='big')


def test_a_file_that_is_no_detector(tmp_path):
    logits = np.zeros((1, 1000), np.float32)
    file = onnx_files.constant(tmp_path / 'a.onnx', dict(probs=logits))
    with pytest.raises(
        ConfigError, match=r'has the outputs probs \(B, 1000\)'
    ):
        detector(file, classes=['a'])
    other = onnx_files.brightness(tmp_path / 'b.onnx', (1, 1, 64, 64))
    with pytest.raises(ConfigError, match=r'takes image \[1, 1, 64, 64\]'):
        detector(other, classes=['a'])


def test_outputs_that_do_not_tell_images_apart(tmp_path):
    rows = np.zeros((7, 6), np.float32)
    file = onnx_files.constant(tmp_path / 'a.onnx', dict(rows=rows))
    with pytest.raises(ConfigError, match=r'output rows of shape \(7, 6\)'):
        detector(file, classes=['a', 'b'])


def test_labels_that_the_classes_lack(tmp_path):
    dets = np.array([[[1, 2, 3, 4, 0.9]]], np.float32)
    outputs = dict(dets=dets, labels=np.array([[7]]))
    file = onnx_files.constant(tmp_path / 'a.onnx', outputs)
    teacher = detector(file, classes=['a', 'b'])
    with pytest.raises(ConfigError, match=r'outside the 2 classes.*label 7'):
        teacher.detect([grey(0)], ['x'])


def test_a_file_that_is_missing_or_damaged(tmp_path):
    (tmp_path / 'cut.onnx').write_bytes(b'onnx')
    with pytest.raises(ConfigError, match='onnxruntime cannot open'):
        detector(tmp_path / 'cut.onnx', classes=['a'])
    with pytest.raises(ConfigError, match=r'Did you mean .*cut\.onnx'):
        detector(tmp_path / 'cutt.onnx', classes=['a'])


def test_a_provider_that_is_missing(tmp_path):
    file = onnx_files.brightness(tmp_path / 'a.onnx')
    if 'CUDAExecutionProvider' not in onnxruntime.get_available_providers():
        with pytest.raises(ConfigError, match='needs the CUDAExecutionProv'):
            detector(file, classes=['a'], device='cuda')
    with pytest.raises(ConfigError, match="one of cpu, cuda, got 'tpu'"):
        detector(file, classes=['a'], device='tpu')


def test_onnxruntime_is_imported_when_it_is_needed(tmp_path, monkeypatch):
    file = onnx_files.brightness(tmp_path / 'a.onnx')
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(PackageError, match=r"pip install 'mmkd\[onnx\]'"):
        detector(file, classes=['a'])


def test_its_mean_is_that_of_pixels():
    """It is no ensemble of teachers, whose key is called the same."""
    own = dict(type='mmkd.OnnxDetector', file='a.onnx', mean=[1.0, 2.0, 3.0])
    other = dict(config='a.py', checkpoint='a.pth')
    marked = changed([own, other], lambda options: {**options, 'marked': 1})
    assert marked == [own, dict(other, marked=1)]


# ------------------------------------------------------------- a real detector

NANODET = dict(
    classes='coco',
    resize='stretch',
    mean=[103.53, 116.28, 123.675],
    std=[57.375, 57.12, 58.395],
    to_rgb=False,
    nms_iou=0.6,
)


def nanodet(shared, **options):
    file = shared / 'nanodet' / 'nanodet_g_coco.onnx'
    return detector(file, **NANODET, **options)


def reference(shared, path):
    """NanoDet's boxes by its definition, for scores from .4 on, by a loop.

    The suppression is left out: each box is what the network says.
    """
    file = shared / 'nanodet' / 'nanodet_g_coco.onnx'
    session = onnxruntime.InferenceSession(str(file))
    image = cv2.imread(str(path))
    pixels = cv2.resize(image, (416, 416)).astype(np.float64)
    pixels = (pixels - NANODET['mean']) / NANODET['std']
    batch = pixels.transpose(2, 0, 1)[None].astype(np.float32)
    values = {v.shape: v[0] for v in session.run(None, {'image': batch})}
    height, width = image.shape[:2]
    for stride in (8, 16, 32):
        side = 416 // stride
        scores = values[1, side**2, 80]
        logits = values[1, side**2, 44].reshape(-1, 4, 11).astype(np.float64)
        for place, label in np.argwhere(scores >= 0.4):
            softmax = np.exp(logits[place])
            softmax /= softmax.sum(1, keepdims=True)
            left, top, right, bottom = softmax @ np.arange(11) * stride
            x, y = (
                n * stride + (stride - 1) / 2
                for n in (place % side, place // side)
            )
            box = np.array([x - left, y - top, x + right, y + bottom])
            box *= np.array([width, height, width, height]) / 416
            yield box, scores[place, label], label


def test_nanodet_by_its_definition(shared_data):
    """Every box that is kept is one that the network says, and the best is."""
    teacher = nanodet(shared_data, score_thr=0.4)
    paths = sorted((shared_data / 'coco_tiny' / 'val2017').glob('*.jpg'))
    compared = 0
    for path in paths[:5]:
        found = teacher.detect([read_image(str(path))], [str(path)])[0]
        said = list(reference(shared_data, path))
        for box, score, label in zip(*found, strict=True):
            same = [
                b for b, s, k in said if k == label and abs(s - score) < 1e-4
            ]
            height, width = cv2.imread(str(path)).shape[:2]
            clip = [np.clip(b, 0, [width, height] * 2) for b in same]
            assert any(np.abs(box - b).max() < 0.05 for b in clip)
            compared += 1
        for label in {k for _, _, k in said}:
            best = max(s for _, s, k in said if k == label)
            ours = found.scores[found.labels == label].max()
            assert abs(best - ours) < 1e-4
    assert compared >= 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ('split', 'expected'), [('train2017', 0.324), ('val2017', 0.261)]
)
def test_the_ap_of_nanodet(shared_data, split, expected):
    """Its AP with its own code on these photos (NanoDet-g, COCO)."""
    root = shared_data / 'coco_tiny'
    path = root / 'annotations' / f'instances_{split}.json'
    content, teacher = read_json(path), nanodet(shared_data)
    ids = {row['name']: row['id'] for row in content['categories']}
    rows = []
    for image in content['images']:
        name = str(root / split / image['file_name'])
        found = teacher.detect([read_image(name)], [name])[0]
        for (x0, y0, x1, y1), score, label in zip(*found, strict=True):
            rows.append(
                dict(
                    image_id=image['id'],
                    category_id=ids[COCO[label]],
                    bbox=[float(v) for v in (x0, y0, x1 - x0, y1 - y0)],
                    score=float(score),
                )
            )
    figures = evaluate(load_truth(path, 'bbox'), rows, 'bbox').figures
    assert figures['AP'] == pytest.approx(expected, abs=0.005)


# ---------------------------------------------------- what `mmkd export` wrote


def test_a_file_of_mmkd_export(tmp_path):
    """It needs no options, and finds what the detector finds."""
    torch.manual_seed(0)
    canvas = Canvas(96, 128)
    model = lively(tiny.build(tiny.retinanet()), canvas.shape)
    about = describe(model, tiny.CLASSES, canvas)
    graph = finish(detector_graph(model, canvas.shape, canvas.padding), about)
    (tmp_path / 'own.onnx').write_bytes(graph)
    teacher = detector(tmp_path / 'own.onnx')
    assert teacher.classes == tiny.CLASSES
    photo = photos(1)[0]
    boxes, scores, labels = by_torch(model, *canvas.fit(photo), canvas)
    rgb = np.ascontiguousarray(photo[..., ::-1])
    found = teacher.detect([rgb], ['x'])[0]
    height, width = photo.shape[:2]
    boxes = boxes / min(96 / height, 128 / width)
    boxes = np.clip(boxes, 0, [width, height] * 2)
    order = np.argsort(-scores, kind='stable')
    order = order[scores[order] >= 0.05]
    assert len(order) > 2
    np.testing.assert_allclose(found.scores, scores[order], atol=0.01)
    top = order[0]
    assert found.labels[0] == labels[top]
    np.testing.assert_allclose(found.boxes[0], boxes[top], atol=2)


# --------------------------------------------------------------- in a training


def test_a_training_learns_from_it(tmp_path):
    """Each file is looked at once; the second epoch reads the cache."""
    file = onnx_files.brightness(tmp_path / 'a.onnx')
    cfg = toy.distilled(
        tmp_path / 'run',
        toy.RETINANET,
        methods=dict(read=dict(type='mmkd.ReadBoxes')),
        teacher=dict(
            type='mmkd.OnnxDetector',
            file=file,
            classes=['person'],
            cache=dict(dir=str(tmp_path / 'cache')),
        ),
        epochs=2,
    )
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    record = toy.Record()
    runner = toy.train(cfg, record)
    method = runner.distiller.methods.read
    assert isinstance(method, ReadBoxes)
    assert sum(len(found) for found in method.read) > 0
    hits = [losses['teacher.cache_hits'] for losses in record.losses]
    half = len(hits) // 2
    assert sum(hits[:half]) == 0
    assert set(hits[half:]) == {1}
