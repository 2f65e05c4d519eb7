"""A teacher that is a Python function."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmkd.errors import ConfigError
from mmkd.teachers.build import build_teacher
from mmkd.teachers.view import TeacherContext

ALONE = TeacherContext(None, (), named=False)
HERE = __name__
ANSWER = dict(
    boxes=[[0, 0, 4, 4], [1, 1, 9, 9], [2, 2, 3, 3]],
    scores=[0.3, 0.9, 0.01],
    labels=[1, 0, 0],
)
SEEN = []


def as_dict(image):
    SEEN.append(image)
    return ANSWER


def as_tensors(image):
    return {
        name: torch.tensor(value, requires_grad=name != 'labels')
        if name != 'boxes'
        else torch.tensor(value)
        for name, value in ANSWER.items()
    }


def as_supervision(image):
    return SimpleNamespace(
        xyxy=np.array(ANSWER['boxes'], float),
        confidence=np.array(ANSWER['scores']),
        class_id=np.array(ANSWER['labels']),
        mask=None,
    )


def named(image):
    return ANSWER | dict(labels=['dog', 'cat', 'cat'])


def batched(images):
    return [as_dict(image) for image in images]


def nothing(image):
    return dict(boxes=[], scores=[], labels=[])


def fails_on_dark(image):
    if image.mean() < 10:
        raise RuntimeError('too dark')
    return ANSWER


def batch_fails_on_dark(images):
    return [fails_on_dark(image) for image in images]


def detector(function, **options):
    cfg = dict(
        type='mmkd.PythonDetector',
        function=f'{HERE}:{function}',
        classes=['cat', 'dog'],
        **options,
    )
    return build_teacher(cfg, ALONE)


def image_of(value=50):
    return np.full((8, 10, 3), value, np.uint8)


@pytest.mark.parametrize(
    'function', ['as_dict', 'as_tensors', 'as_supervision', 'named']
)
def test_answers_in_all_forms(function):
    found = detector(function).detect([image_of()], ['x'])[0]
    assert found.boxes.tolist() == [[1, 1, 9, 9], [0, 0, 4, 4]]
    np.testing.assert_allclose(found.scores, [0.9, 0.3], rtol=1e-6)
    assert found.labels.tolist() == [0, 1]


def test_a_function_of_several_images():
    images = [image_of(1), image_of(2)]
    SEEN.clear()
    found = detector('batched', batched=True).detect(images, ['x', 'y'])
    assert [image[0, 0, 0] for image in SEEN] == [1, 2]
    assert [each.labels.tolist() for each in found] == [[0, 1]] * 2
    with pytest.raises(ConfigError, match='an answer for each of 1 images'):
        detector('as_dict', batched=True).detect([image_of()], ['x'])


def test_thresholds():
    found = detector('as_dict', score_thr=0.5).detect([image_of()], ['x'])[0]
    assert found.labels.tolist() == [0]
    found = detector('as_dict', score_thr=0, max_per_image=2)
    assert len(found.detect([image_of()], ['x'])[0].scores) == 2
    assert len(detector('nothing').detect([image_of()], ['x'])[0].boxes) == 0


@pytest.mark.parametrize(
    ('function', 'options'),
    [('fails_on_dark', {}), ('batch_fails_on_dark', dict(batched=True))],
)
def test_a_function_that_fails_on_an_image(function, options, logged):
    images, names = [image_of(), image_of(0), image_of()], ['a', 'dark', 'c']
    with pytest.raises(ConfigError) as caught:
        detector(function, **options).detect(images, names)
    assert f'{function} fails on dark: RuntimeError: too dark' in str(
        caught.value
    )
    teacher = detector(function, on_error='skip', **options)
    found = teacher.detect(images, names)
    assert [each is None for each in found] == [False, True, False]
    assert teacher.skipped == 1
    assert 'fails on dark' in logged[-1]


def answers(value):
    return lambda image: value


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(boxes=None), 'a dict with boxes, scores, labels, without boxes'),
        (dict(scores=[0.1]), '3 boxes, 1 scores and 3 labels'),
        (dict(scores=[0.1, np.nan, 0]), 'numbers that are not finite'),
        (dict(scores=[90, 10, 5]), 'scores from 5 to 90'),
        (dict(labels=[0, 2, 0]), 'labels from 0 to 2 for 2 classes'),
        (dict(labels=['cat', 'fox', 'cat']), "the label 'fox', which is none"),
        (dict(boxes=[[{}] * 4] * 3), 'values of the type object'),
    ],
)
def test_an_answer_that_is_none(changes, message, monkeypatch):
    wrong = answers(ANSWER | changes)
    monkeypatch.setattr(sys.modules[HERE], 'as_dict', wrong)
    with pytest.raises(ConfigError) as caught:
        detector('as_dict').detect([image_of()], ['a.jpg'])
    assert message in str(caught.value)
    assert 'for a.jpg it returns' in str(caught.value)


def test_no_object_at_all(monkeypatch):
    monkeypatch.setattr(sys.modules[HERE], 'as_dict', answers(None))
    with pytest.raises(ConfigError, match='it returns NoneType, without box'):
        detector('as_dict').detect([image_of()], ['a.jpg'])


def test_the_identity():
    """The text of the module, the name and the version tell answers apart."""
    base = detector('as_dict').identity
    assert detector('as_dict').identity == base
    others = [
        detector('named'),
        detector('as_dict', version='yolo11n'),
        detector('as_dict', score_thr=0.3),
    ]
    assert len({base, *(each.identity for each in others)}) == 4


def test_options():
    with pytest.raises(ConfigError, match="on_error must be one of 'stop'"):
        detector('as_dict', on_error='ignore')
    with pytest.raises(ConfigError, match='must be "module:function", got'):
        build_teacher(
            dict(type='mmkd.PythonDetector', function='f', classes=['a']),
            ALONE,
        )
    with pytest.raises(ConfigError, match='has no option "func"'):
        build_teacher(dict(type='mmkd.PythonDetector', func=''), ALONE)


# -------------------------------------------------- a model of transformers

DETR = """
import torch
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

torch.manual_seed(0)
backbone = ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1],
    out_features=['stage4'],
)
config = DetrConfig(
    use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
    backbone_config=backbone, num_queries=6, d_model=16, encoder_layers=1,
    decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=16, decoder_ffn_dim=16, num_labels=2,
)
model = DetrForObjectDetection(config).eval()


def detect(image):
    height, width = image.shape[:2]
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    found = model(pixel_values=pixels)
    scores, labels = found.logits.softmax(-1)[0, :, :-1].max(-1)
    x, y, w, h = found.pred_boxes[0].unbind(-1)
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
    boxes = boxes * torch.tensor([width, height, width, height])
    return dict(boxes=boxes, scores=scores, labels=labels)
"""


def test_a_detr_of_transformers(tmp_path, monkeypatch):
    """A real model of another library, with random weights."""
    pytest.importorskip('transformers')
    (tmp_path / 'hf_detr.py').write_text(DETR)
    monkeypatch.syspath_prepend(tmp_path)
    cfg = dict(
        type='mmkd.PythonDetector',
        function='hf_detr:detect',
        classes=['cat', 'dog'],
        score_thr=0.0,
    )
    teacher = build_teacher(cfg, ALONE)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 96, 3), np.uint8)
    found = teacher.detect([image], ['x'])[0]
    with torch.no_grad():
        expected = sys.modules['hf_detr'].detect(image)
    order = expected['scores'].argsort(descending=True, stable=True)
    assert found.boxes.shape == (6, 4)
    np.testing.assert_allclose(
        found.boxes, expected['boxes'][order].numpy(), rtol=1e-4
    )
    assert found.labels.tolist() == expected['labels'][order].tolist()
