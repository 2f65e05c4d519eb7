"""What a teacher runs, on what, and that it stays as it is."""

import copy
import random

import numpy as np
import pytest
import torch

from mmkd.core.distiller import build_distiller
from mmkd.data.batch import Batch
from mmkd.detectors.record import StepRecord
from mmkd.teachers.frozen import FrozenDetector
from tests.helpers import tiny_detectors as tiny

CAFFE = dict(
    type='DetDataPreprocessor',
    mean=[103.53, 116.28, 123.675],
    std=[1.0, 1.0, 1.0],
)


def teacher_config(model=None, classes=tiny.CLASSES):
    dataset = dict(type='CocoDataset', metainfo=dict(classes=classes))
    return dict(
        model=model or tiny.faster_rcnn(),
        test_dataloader=dict(dataset=dataset),
    )


@pytest.fixture(scope='module')
def student():
    return tiny.build(tiny.faster_rcnn())


@pytest.fixture(scope='module')
def trained():
    """The network whose weights the checkpoints hold."""
    return tiny.build(tiny.faster_rcnn(), seed=5)


def wrap(model, student, classes=tiny.CLASSES, paths=()):
    return FrozenDetector(
        model,
        classes,
        student=student,
        student_classes=tiny.CLASSES,
        paths=paths,
    )


# ------------------------------------------------------------- what runs


def calls_of(model):
    """Count the forward passes of a detector's parts, with real hooks."""
    counts = dict.fromkeys(('backbone', 'neck', 'rpn_head', 'box_head'), 0)
    parts = [model.backbone, model.neck, model.rpn_head]
    for name, part in zip(
        counts, [*parts, model.roi_head.bbox_head], strict=True
    ):

        def count(*_, name=name):
            counts[name] += 1

        part.register_forward_hook(count)
    return counts


@pytest.fixture
def step(student):
    """A batch and the student's recorded step on it."""
    inputs, samples = tiny.batch_for(student)
    outputs = StepRecord(student, ['roi_head.bbox_head.shared_fcs.1'])
    with outputs.recording():
        tiny.seeded_loss(student, inputs, samples)
    return inputs, samples, outputs


def test_each_part_runs_when_it_is_read_and_once(trained, student, step):
    model = copy.deepcopy(trained)
    counts = calls_of(model)
    inputs, samples, outputs = step
    view = wrap(model, student, paths=('neck', 'backbone')).view(
        Batch(inputs, samples)
    )
    assert set(counts.values()) == {0}
    view.features('neck', outputs)
    view.features('backbone', outputs)
    assert list(counts.values()) == [1, 1, 0, 0]
    view.score_anchors(outputs.anchors)
    assert list(counts.values()) == [1, 1, 1, 0]
    view.score_rois(outputs.rois[0], 0)
    view.score_rois(outputs.rois[0], 0)
    view.score_anchors(outputs.anchors)
    assert list(counts.values()) == [1, 1, 1, 1]


def test_a_one_stage_head_runs_when_it_is_read():
    model = tiny.build(tiny.retinanet())
    inputs, samples = tiny.batch_for(model)
    teacher = wrap(model, model)
    scores, deltas = teacher.view(Batch(inputs, samples)).raw_dense
    with torch.no_grad():
        expected = model.bbox_head(model.extract_feat(inputs))
    for ours, theirs in zip(
        (*scores, *deltas), (*expected[0], *expected[1]), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_scores_are_the_networks_own(trained, student, step):
    inputs, samples, outputs = step
    model = copy.deepcopy(trained)
    view = wrap(model, student, paths=('neck',)).view(Batch(inputs, samples))
    logits, deltas, coder = view.score_rois(outputs.rois[0], 0)
    assert coder is model.roi_head.bbox_head.bbox_coder
    with torch.no_grad():
        expected = model.roi_head._bbox_forward(
            model.extract_feat(inputs), outputs.rois[0].boxes
        )
    assert torch.equal(logits, expected['cls_score'])
    assert torch.equal(deltas, expected['bbox_pred'])
    assert not logits.requires_grad
    assert not view.features('neck', outputs)[0].requires_grad


def test_taps_in_the_heads(trained, student, step):
    inputs, samples, outputs = step
    model = copy.deepcopy(trained)
    paths = ('rpn_head.rpn_conv', 'roi_head.bbox_head.shared_fcs.1')
    view = wrap(model, student, paths=paths).view(Batch(inputs, samples))
    assert len(view.features(paths[0], outputs)) == 5
    (vectors,) = view.features(paths[1], outputs)
    with torch.no_grad():
        maps = model.extract_feat(inputs)
        x = model.roi_head.bbox_roi_extractor(maps[:4], outputs.rois[0].boxes)
        head = model.roi_head.bbox_head
        hidden = head.shared_fcs[0](x.flatten(1)).relu()
        expected = head.shared_fcs[1](hidden)
    # The stock head's ReLU works in place, on the tapped tensor.
    torch.testing.assert_close(vectors, expected.relu())


def test_no_random_number_is_drawn(trained, student, step):
    inputs, samples, outputs = step
    model = copy.deepcopy(trained)
    drawn = []

    def draw(*_):
        drawn.append((random.random(), np.random.rand(), torch.rand(1)))

    for part in (model.backbone, model.rpn_head, model.roi_head.bbox_head):
        part.register_forward_hook(draw)
    view = wrap(model, student).view(Batch(inputs, samples))
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    view.score_anchors(outputs.anchors)
    view.score_rois(outputs.rois[0], 0)
    assert len(drawn) == 3
    assert random.getstate() == states[0]
    assert all(
        np.array_equal(a, b)
        for a, b in zip(np.random.get_state(), states[1], strict=True)
    )
    assert torch.equal(torch.get_rng_state(), states[2])


def test_teacher_scores_as_on_its_own_preprocessing(student, trained):
    """The conversion reaches the network: same RPN scores as by itself."""
    config = tiny.faster_rcnn()
    config.data_preprocessor = CAFFE
    caffe = tiny.build(config)
    caffe.load_state_dict(trained.state_dict())
    teacher = wrap(caffe, student)
    options = dict(sizes=((96, 128), (64, 96)))
    batch = Batch(*tiny.batch_for(student, **options))
    scores, _ = teacher.view(batch).rpn
    inputs, _ = tiny.batch_for(caffe, **options)
    with torch.no_grad():
        expected, _ = caffe.rpn_head(caffe.extract_feat(inputs))
    for ours, theirs in zip(scores, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# -------------------------------------------------------- frozen and apart


def swin():
    """A backbone with much DropPath."""
    model = tiny.faster_rcnn(
        neck__in_channels=[8, 16, 32, 64],
    )
    model.backbone = dict(
        type='SwinTransformer',
        embed_dims=8,
        depths=[2, 2, 2, 2],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        mlp_ratio=1,
        drop_path_rate=0.8,
    )
    return model


def test_it_stays_in_eval_mode_also_drop_path(student):
    student = copy.deepcopy(student)
    cfg = dict(
        teacher=dict(config=teacher_config(swin()), checkpoint=None),
        methods=dict(hint=dict(type='mmkd.FeatureHint')),
    )
    with pytest.warns(UserWarning, match='UNTRAINED'):
        distiller = build_distiller(cfg, student, tiny.CLASSES)
    distiller.attach()
    student.train()
    teacher = distiller.teacher
    assert student.backbone.training
    assert distiller.training
    assert not any(m.training for m in teacher.model.modules())
    inputs, samples = tiny.batch_for(student)
    batch = Batch(inputs, samples)
    first, second = (teacher.view(batch).maps[0] for _ in range(2))
    assert torch.equal(first, second)
    teacher.model.train()  # what it would be as a child of the student
    with torch.no_grad():
        torch.manual_seed(0)
        third = teacher.model.extract_feat(inputs)[0]
    assert not torch.allclose(first, third)


def test_it_is_frozen_and_no_part_of_the_student(student, trained):
    student, model = copy.deepcopy(student), copy.deepcopy(trained)
    teacher = wrap(model, student)
    assert not any(p.requires_grad for p in model.parameters())
    student.teacher = teacher
    assert not {*map(id, model.modules())} & {*map(id, student.modules())}


def test_copies_of_the_student_share_it(student, trained):
    teacher = wrap(copy.deepcopy(trained), student)
    assert copy.deepcopy(teacher) is teacher
    assert copy.deepcopy({'a': [teacher]})['a'][0].model is teacher.model
