"""`mmkd export`: what is written is what PyTorch finds, or nothing is."""

import json
import os
import runpy

import cv2
import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.models import RetinaHead
from mmdet.registry import MODELS
from mmengine.config import Config

from mmkd.cli.main import main
from mmkd.export.canvas import Canvas
from mmkd.export.check import detect, pair_up, run, start
from tests.helpers import tiny_detectors as tiny
from tests.helpers import toy
from tests.helpers.lively import lively, photos

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

SHAPE = (96, 128)
EXAMPLE = toy.ROOT / 'docs' / 'examples' / 'detect_onnx.py'
MODELS_OF_KINDS = {
    'one-stage': tiny.retinanet,
    'two-stage': tiny.mask_rcnn,
    'queries': lambda: tiny.merged(
        tiny.detr(), num_queries=20, test_cfg__max_per_img=15
    ),
}


def pipeline(height, width):
    return [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(width, height), keep_ratio=True),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(
            type='PackDetInputs',
            meta_keys=('img_id', 'img_shape', 'ori_shape', 'scale_factor'),
        ),
    ]


def student(folder, model_cfg, model):
    """Write a config of a data set that is not here, and a checkpoint."""
    dataset = dict(
        type='CocoDataset',
        data_root=str(folder / 'elsewhere'),
        ann_file='missing.json',
        metainfo=dict(classes=tiny.CLASSES),
        pipeline=pipeline(*SHAPE),
    )
    loader = dict(batch_size=1, num_workers=0, dataset=dataset)
    # The teacher of a distilled config is not here either.
    distillation = dict(teacher=dict(config='a.py', checkpoint='a.pth'))
    cfg = dict(
        model=model_cfg,
        test_dataloader=loader,
        runner_type='mmkd.DistillationRunner',
        distillation=distillation,
    )
    Config(cfg).dump(folder / 'student.py')
    meta = dict(dataset_meta=dict(classes=tiny.CLASSES))
    path = folder / 'student.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return str(folder / 'student.py'), str(path)


def export(folder, *options):
    config, checkpoint = folder / 'student.py', folder / 'student.pth'
    return main(['export', str(config), str(checkpoint), '--onnx', *options])


@pytest.fixture(scope='module', params=list(MODELS_OF_KINDS))
def kind(request, tmp_path_factory):
    """A detector that finds many boxes in some photos and none in one."""
    folder = tmp_path_factory.mktemp('student')
    model_cfg = MODELS_OF_KINDS[request.param]()
    model = lively(tiny.build(model_cfg), SHAPE)
    canvas = Canvas(*SHAPE)
    pictures = photos(6, seed=3)
    if request.param != 'queries':  # which have no threshold
        best = sorted(
            detect(model, *canvas.fit(picture), canvas)[1].max(initial=0)
            for picture in pictures
        )
        # Between the best boxes of two photos.
        test = model_cfg.test_cfg
        test = test.rcnn if 'rcnn' in test else test
        test.score_thr = float(best[0] + best[1]) / 2
        model = tiny.build(model_cfg).eval()
        lively(model, SHAPE)
    student(folder, model_cfg, model)
    assert export(folder) == 0
    return request.param, folder, model, pictures


def same(ours, theirs):
    """Whether they are the same boxes, scores and labels, in any order."""
    assert len(ours[0]) == len(theirs[0])
    return len(list(pair_up(ours, theirs))) == len(ours[0])


def test_each_kind_finds_the_same_in_other_photos(kind):
    name, folder, model, pictures = kind
    canvas = Canvas(*SHAPE)
    session = start((folder / 'student.onnx').read_bytes())
    counts = []
    for picture in pictures:
        image, size = canvas.fit(picture)
        ours = detect(model, image, size, canvas)
        assert same(ours, run(session, image, size))
        counts.append(len(ours[0]))
    if name == 'queries':
        assert counts == [15] * 6
    else:
        assert counts.count(0) == 1
        assert max(counts) > 3


def test_it_is_what_the_stock_detector_finds(kind):
    """By MMDetection's own inference, on a photo that fills the image."""
    _, folder, _, pictures = kind
    model = init_detector(
        str(folder / 'student.py'), str(folder / 'student.pth'), device='cpu'
    )
    session = start((folder / 'student.onnx').read_bytes())
    for picture in pictures:
        photo = cv2.resize(picture, SHAPE[::-1])
        found = inference_detector(model, photo).pred_instances
        ours = [found[k].numpy() for k in ('bboxes', 'scores', 'labels')]
        assert same(ours, run(session, photo, np.array(SHAPE)))


def test_what_is_beside_it_and_in_it_says_how_to_use_it(kind):
    _, folder, _, _ = kind
    about = json.loads((folder / 'student.onnx.json').read_text())
    assert about['classes'] == list(tiny.CLASSES)
    assert (about['height'], about['width'], about['keep_ratio']) == (
        *SHAPE,
        True,
    )
    inside = onnx.load(folder / 'student.onnx').metadata_props
    assert {p.key: json.loads(p.value) for p in inside} == about


def test_the_code_of_the_page_detects_in_a_photo(kind):
    _, folder, model, pictures = kind
    detect_in = runpy.run_path(str(EXAMPLE))['detect']
    path = str(folder / 'student.onnx')
    for photo in pictures[:3]:
        boxes, scores, names = detect_in(path, photo)
        image, size = Canvas(*SHAPE).fit(photo)
        ours = detect(model, image, size, Canvas(*SHAPE))
        assert sorted(names) == sorted(tiny.CLASSES[i] for i in ours[2])
        height, width = photo.shape[:2]
        scale = np.array([width, height] * 2) / np.tile(size[::-1], 2)
        labels = np.array([tiny.CLASSES.index(n) for n in names], int)
        back = boxes * (1 / scale), scores, labels
        assert same(ours, back)


@pytest.fixture(scope='module')
def one_stage(tmp_path_factory):
    folder = tmp_path_factory.mktemp('one')
    model_cfg = tiny.retinanet()
    student(folder, model_cfg, lively(tiny.build(model_cfg), SHAPE))
    return folder


def test_the_same_input_gives_the_same_bytes(one_stage, tmp_path, capsys):
    """And it needs no data: the pictures are drawn, which is said."""
    for name in ('a.onnx', 'b.onnx'):
        out = ('--out', str(tmp_path / name), '--num-images', '2')
        assert export(one_stage, *out) == 0
    said = capsys.readouterr().out
    assert 'RetinaNet with 3 classes; images of 96 x 128' in said
    assert '2 pictures that are drawn, because those of the config' in said
    assert 'only PyTorch has 0, only onnxruntime 0' in said
    a, b = ((tmp_path / n).read_bytes() for n in ('a.onnx', 'b.onnx'))
    assert a == b


def test_it_is_checked_on_given_pictures(one_stage, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / 'a.png'), photos(1)[0])
    (tmp_path / 'b.jpg').write_text('no picture')
    out = str(tmp_path / 'x' / 'a.onnx')
    given = ('--images', str(tmp_path), '--out', out, '--size', '64', '96')
    assert export(one_stage, *given) == 0
    said = capsys.readouterr().out
    assert f'checked on 1 pictures of {tmp_path}' in said
    assert 'images of 64 x 96' in said


@MODELS.register_module(name='ExportMoody', force=True)
class Moody(RetinaHead):
    """Python decides by the numbers of an image, which a trace cannot keep."""

    def predict_by_feat(self, cls_scores, bbox_preds, **options):
        best = max(float(scores.max()) for scores in cls_scores)
        cls_scores = [scores - best for scores in cls_scores]
        return super().predict_by_feat(cls_scores, bbox_preds, **options)


def test_a_graph_that_finds_something_else_is_not_written(tmp_path, capsys):
    model_cfg = tiny.retinanet(bbox_head__type='ExportMoody')
    student(tmp_path, model_cfg, lively(tiny.build(model_cfg), SHAPE))
    out = tmp_path / 'student.onnx'
    out.write_text('of before')
    assert export(tmp_path) == 1
    error = capsys.readouterr().err
    assert 'error: onnxruntime does not find what PyTorch finds' in error
    assert 'Nothing is written' in error
    assert out.read_text() == 'of before'
    assert not list(tmp_path.glob('*.json'))
    assert export(tmp_path, '--no-check') == 0
    onnx.checker.check_model(onnx.load(out))


def test_softer_suppression_is_refused(one_stage, capsys):
    soft = '--cfg-options', 'model.test_cfg.nms.type=soft_nms'
    assert export(one_stage, '--no-check', *soft) == 1
    assert "dict(type='nms', iou_threshold=0.5)" in capsys.readouterr().err


@pytest.mark.skipif(os.getuid() == 0, reason='root may write anywhere')
def test_a_folder_that_cannot_be_written_to(one_stage, tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert export(one_stage, '--out', str(tmp_path / 'a.onnx')) == 1
    assert 'Give yourself the rights' in capsys.readouterr().err


def test_without_onnxruntime(one_stage, monkeypatch, capsys):
    monkeypatch.setattr('mmkd.export.command.find_spec', lambda name: None)
    assert export(one_stage) == 1
    assert "pip install 'mmkd[onnx]'" in capsys.readouterr().err
