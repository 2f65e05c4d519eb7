"""A pretrained image encoder as a teacher of features."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mmkd
from mmkd.core.distiller import build_distiller
from mmkd.data.batch import Batch
from mmkd.teachers.build import build_teacher
from mmkd.teachers.encoder import FoundationEncoder
from tests.helpers import encoders
from tests.helpers import tiny_detectors as tiny

SIZES = ((96, 128), (64, 96))
HINT = dict(
    hint=dict(
        type='mmkd.FeatureHint', levels=[0], teacher_levels=[0], resize=True
    )
)


@pytest.fixture
def logged(monkeypatch):
    """What is printed to the log."""
    texts = []
    monkeypatch.setattr(
        'mmkd.teachers.encoder.print_log',
        lambda text, *_, **__: texts.append(text),
    )
    return texts


def build(path, student=None, *, kind='dinov2', changes=None, **options):
    """The teacher of a student, with a tiny encoder saved in a folder."""
    student = student or tiny.build(tiny.retinanet())
    cfg = dict(
        type='mmkd.FoundationEncoder',
        name=encoders.folder(path, kind, **(changes or {})),
        **options,
    )
    context = mmkd.TeacherContext(student, tiny.CLASSES)
    return build_teacher(cfg, context)


def batch_of(student, sizes=SIZES):
    return Batch(*tiny.batch_for(student, sizes=sizes))


def as_the_encoder_saw(raw, size):
    """Raw pictures, BGR, in the encoder's own normalisation and padding."""
    mean, std = (torch.tensor(v)[:, None, None] for v in MEAN_STD)
    padded = torch.zeros(len(raw), 3, *size)
    for image, picture in zip(padded, raw, strict=True):
        picture = picture.flip(0).float() / 255
        height, width = picture.shape[1:]
        image[:, :height, :width] = (picture - mean) / std
    return padded


MEAN_STD = encoders.PIXELS['image_mean'], encoders.PIXELS['image_std']
CAFFE = dict(
    type='DetDataPreprocessor',
    mean=[103.53, 116.28, 123.675],
    std=[1.0, 1.0, 1.0],
    bgr_to_rgb=False,
    pad_size_divisor=32,
)


@pytest.mark.parametrize('preprocessor', [None, CAFFE])
def test_it_sees_its_own_pixels(tmp_path, preprocessor):
    config = tiny.retinanet()
    if preprocessor is not None:
        config.data_preprocessor = preprocessor
    student = tiny.build(config)
    raw = tiny.raw_batch(sizes=SIZES)['inputs']
    (found,) = build(tmp_path, student).view(batch_of(student)).maps
    images = as_the_encoder_saw(raw, (96, 128))
    with torch.no_grad():
        tokens = encoders.network()(images).last_hidden_state[:, 1:]
    expected = tokens.mT.reshape(2, 16, 12, 16)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_batches_are_resized_to_its_patch(tmp_path, logged):
    student = tiny.build(tiny.retinanet())
    teacher = build(tmp_path, student, changes=dict(patch_size=14))
    logged.clear()
    batch = batch_of(student)
    (found,) = teacher.view(batch).maps
    assert teacher.view(batch).maps[0].shape == (2, 16, 7, 9)
    raw = tiny.raw_batch(sizes=SIZES)['inputs']
    images = F.interpolate(
        as_the_encoder_saw(raw, (96, 128)),
        size=(98, 126),  # 7 x 9 patches
        mode='bilinear',
        antialias=True,
    )
    with torch.no_grad():
        tokens = encoders.network(patch_size=14)(images).last_hidden_state
    expected = tokens[:, 1:].mT.reshape(2, 16, 7, 9)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    (text,) = logged  # of two batches
    assert 'its patch of 14 pixels' in text
    assert text.endswith('96 x 128, as 98 x 126')


def test_batches_that_fit_are_not_mentioned(tmp_path, logged):
    student = tiny.build(tiny.retinanet())
    teacher = build(tmp_path, student)
    logged.clear()
    teacher.view(batch_of(student))
    assert not logged


@pytest.mark.parametrize(
    ('patch', 'size', 'batch', 'expected'),
    [
        (14, None, (800, 1333), (798, 1330)),  # 57.1 and 95.2 patches
        (16, None, (800, 1344), (800, 1344)),
        (14, 448, (800, 1333), (266, 448)),  # 19.2 and 32 patches
        (16, 320, (640, 640), (320, 320)),
        (16, 64, (1000, 20), (64, 16)),  # no side has less than a patch
    ],
)
def test_sizes(tmp_path, patch, size, batch, expected):
    changes = dict(patch_size=patch, image_size=2 * patch)
    teacher = build(tmp_path, changes=changes, size=size)
    assert teacher.fitted(*batch) == expected


def test_the_size_is_the_users(tmp_path, logged):
    student = tiny.build(tiny.retinanet())
    teacher = build(tmp_path, student, size=64)
    logged.clear()
    assert teacher.view(batch_of(student)).maps[0].shape == (2, 16, 6, 8)
    assert not logged


def test_half_precision_inside_single_outside(tmp_path):
    student = tiny.build(tiny.retinanet())
    batch = batch_of(student)
    (single,) = build(tmp_path / 'a', student).view(batch).maps
    half_teacher = build(tmp_path / 'b', student, autocast='bfloat16')
    (half,) = half_teacher.view(batch).maps
    assert half.dtype == torch.float32
    assert not torch.equal(half, single)
    similarity = F.cosine_similarity(half, single).mean()
    assert similarity > 0.99


def test_it_draws_no_numbers_and_gets_no_gradient(tmp_path):
    states = random.getstate(), np.random.get_state()[1].copy()
    torch_state = torch.get_rng_state()
    student = tiny.build(tiny.retinanet())
    batch = batch_of(student)
    batch.inputs.requires_grad_()
    # In training mode this one draws numbers: drop path, and the shift of
    # its positions.
    kind = dict(kind='dinov3', changes=dict(drop_path_rate=0.5))
    view = build(tmp_path, student, **kind).view(batch)
    assert not view.maps[0].requires_grad
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_any_path_gives_the_tokens(tmp_path):
    student = tiny.build(tiny.retinanet())
    view = build(tmp_path, student).view(batch_of(student))
    assert view.features('neck', None) is view.maps
    assert view.features('backbone.layer3', None) is view.maps


def test_the_licence_is_printed_once(tmp_path, logged):
    teacher = build(tmp_path, changes=dict(card='---\nlicense: mit\n---'))
    teacher.blank(torch.device('cpu'))
    assert logged == [f'The licence of the teacher {tmp_path}: mit']


def test_it_says_what_it_is(tmp_path):
    teacher = build(tmp_path)
    text = f'Dinov2Model ({tmp_path}), which gives 16 channels for patches'
    assert teacher.describe().startswith(text)
    assert teacher.class_map.identical
    assert teacher.to(torch.device('cpu')) is teacher


def test_it_teaches_methods_on_features(tmp_path):
    student = tiny.build(tiny.retinanet())
    cfg = dict(
        teacher=dict(
            type='mmkd.FoundationEncoder', name=encoders.folder(tmp_path)
        ),
        methods=HINT,
    )
    distiller = build_distiller(cfg, student, tiny.CLASSES)
    distiller.attach()
    losses = tiny.seeded_loss(student, *tiny.batch_for(student))
    losses['hint.loss_hint'].backward()
    assert losses['hint.loss_hint'] > 0
    adapter = distiller.methods['hint'].adapters[0]
    assert adapter.weight.shape[0] == 16
    assert adapter.weight.grad.abs().sum() > 0


def test_a_method_that_asks_for_more_lists_who_fits(tmp_path):
    cfg = dict(
        teacher=dict(
            type='mmkd.FoundationEncoder', name=encoders.folder(tmp_path)
        ),
        methods=dict(kd=dict(type='mmkd.KD')),
    )
    with pytest.raises(mmkd.ConfigError) as caught:
        build_distiller(cfg, tiny.build(tiny.retinanet()), tiny.CLASSES)
    text = str(caught.value)
    assert 'FoundationEncoder gives features. An image encoder has no' in text
    fitting = text.partition('Methods that fit FoundationEncoder: ')[2]
    assert 'FoundationFeatures' in fitting
    assert 'PKD' in fitting


@pytest.mark.parametrize('size', [0, 7, 100.5, True, '224'])
def test_wrong_sizes(tmp_path, size):
    with pytest.raises(mmkd.ConfigError, match='at least 8 pixels, the patch'):
        build(tmp_path, size=size)


def test_a_student_of_other_images(tmp_path):
    config = tiny.merged(tiny.retinanet(), backbone__in_channels=1)
    config.data_preprocessor.update(mean=[127.5], std=[60.0], bgr_to_rgb=False)
    with pytest.raises(mmkd.ConfigError, match='3 channels, the student of 1'):
        build(tmp_path, tiny.build(config))


def test_it_is_one_of_several_teachers(tmp_path):
    student = tiny.build(tiny.retinanet())
    encoder = dict(
        type='mmkd.FoundationEncoder',
        name=encoders.folder(tmp_path),
        label='encoder',
    )
    detector = dict(
        config=dict(model=tiny.retinanet()), checkpoint=None, label='detector'
    )
    cfg = dict(teacher=[encoder, detector], methods=HINT)
    distiller = build_distiller(cfg, student, tiny.CLASSES)
    distiller.attach()
    losses = tiny.seeded_loss(student, *tiny.batch_for(student))
    assert losses['hint.loss_hint_encoder'] > 0
    assert losses['hint.loss_hint_detector'] > 0
    assert isinstance(distiller.teacher.teachers['encoder'], FoundationEncoder)
