"""Boxes are read out of the outputs of the usual files."""

import math

import numpy as np
import pytest

from mmkd.errors import ConfigError
from mmkd.teachers.onnx_decoders import (
    DECODERS,
    Candidates,
    Setting,
    chosen,
    find_decoder,
)

THREE = Setting(classes=3, size=(64, 96))
CHOICE = dict(score_thr=0.05, nms_iou=None, max_per_image=100)


def read(outputs, setting=THREE, name='auto', **choice):
    """Find the decoder of one image's outputs, and choose."""
    shapes = {n: v.shape for n, v in outputs.items()}
    decoder = find_decoder(name, shapes, setting, 'a.onnx')
    found = chosen(decoder.read(outputs, setting), **{**CHOICE, **choice})
    return decoder, found


def test_mmdeploy():
    dets = np.array([[1, 2, 3, 4, 0.9], [5, 6, 9, 8, 0.6]], np.float32)
    decoder, found = read(dict(dets=dets, labels=np.array([2, 0])))
    assert decoder is DECODERS['mmdeploy']
    assert found.boxes.tolist() == [[1, 2, 3, 4], [5, 6, 9, 8]]
    assert found.labels.tolist() == [2, 0]
    np.testing.assert_allclose(found.scores, [0.9, 0.6])


def test_yolo():
    """(4 + K, N): centre and sides, then a score for each class."""
    rows = np.array(
        [[10, 20, 4, 6, 0.1, 0.8, 0.3], [50, 40, 8, 2, 0, 0, 0.04]]
    )
    decoder, found = read(dict(output0=rows.T.astype(np.float32)))
    assert decoder is DECODERS['yolo']
    assert decoder.suppress
    assert found.boxes.tolist() == [[8, 17, 12, 23]] * 3
    assert found.labels.tolist() == [1, 2, 0]
    np.testing.assert_allclose(found.scores, [0.8, 0.3, 0.1], rtol=1e-6)


def test_yolov5():
    """(N, 5 + K): the score of a class is times that of an object."""
    rows = np.array([[10, 20, 4, 6, 0.5, 0.2, 0.8, 0]], np.float32)
    decoder, found = read(dict(output0=rows))
    assert decoder is DECODERS['yolov5']
    assert found.boxes.tolist() == [[8, 17, 12, 23]] * 2
    assert found.labels.tolist() == [1, 0]
    np.testing.assert_allclose(found.scores, [0.4, 0.1], rtol=1e-6)


def test_end_to_end():
    rows = np.array([[8, 17, 12, 23, 0.7, 2], [0, 0, 0, 0, 0, 0]], np.float32)
    decoder, found = read(dict(output0=rows))
    assert decoder is DECODERS['end_to_end']
    assert found.boxes.tolist() == [[8, 17, 12, 23]]
    assert found.labels.tolist() == [2]


def test_detr_with_a_softmax():
    """The last logit is that of no object: K + 1 of them."""
    logits = np.array([[0, 2, 0, 1], [0, 0, 0, 9]], np.float32)
    boxes = np.array([[0.5, 0.5, 0.25, 0.5], [0, 0, 1, 1]], np.float32)
    decoder, found = read(dict(logits=logits, pred_boxes=boxes))
    assert decoder is DECODERS['detr']
    # (0.5, 0.5) of 96 x 64 is (48, 32); the sides are 24 and 32.
    assert found.boxes.tolist() == [[36, 16, 60, 48]]
    expected = math.exp(2) / (2 + math.exp(2) + math.exp(1))
    np.testing.assert_allclose(found.scores, [expected], rtol=1e-6)
    assert found.labels.tolist() == [1]


def test_detr_with_a_sigmoid():
    """K logits: each class is a candidate of its own."""
    logits = np.array([[1.0, -9, 2.0]], np.float32)
    boxes = np.array([[0.5, 0.5, 0.25, 0.5]], np.float32)
    _, found = read(dict(dets=boxes, labels=logits))
    assert found.labels.tolist() == [2, 0]
    expected = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))]
    np.testing.assert_allclose(found.scores, expected, rtol=1e-6)


def test_detr_of_four_classes_tells_boxes_by_their_name():
    setting = Setting(4, (64, 96))
    logits = np.array([[3.0, -9, -9, -9]], np.float32)
    boxes = np.array([[0.5, 0.5, 0.25, 0.5]], np.float32)
    _, found = read(dict(logits=logits, boxes=boxes), setting, name='detr')
    assert found.boxes.tolist() == [[36, 16, 60, 48]]


def test_nanodet_against_a_loop():
    """Each side is the stride times the mean of its distribution."""
    rng = np.random.default_rng(0)
    bins, expected_boxes, expected_scores = 5, [], []
    outputs = {}
    for stride in (16, 8):  # in any order
        height, width = 64 // stride, 96 // stride
        scores = rng.uniform(0, 1, (height * width, 3)).astype(np.float32)
        sides = rng.normal(size=(height * width, 4 * bins)).astype(np.float32)
        outputs[f'b{stride}'] = sides
        outputs[f'a{stride}'] = scores
    for stride in (8, 16):
        width = 96 // stride
        for place, logits in enumerate(outputs[f'b{stride}']):
            x = place % width * stride + (stride - 1) / 2
            y = place // width * stride + (stride - 1) / 2
            left, top, right, bottom = (
                stride
                * sum(i * math.exp(v) for i, v in enumerate(part))
                / sum(math.exp(v) for v in part)
                for part in logits.reshape(4, bins).astype(float)
            )
            expected_boxes.append([x - left, y - top, x + right, y + bottom])
        expected_scores += outputs[f'a{stride}'].tolist()
    shapes = {n: v.shape for n, v in outputs.items()}
    decoder = find_decoder('auto', shapes, THREE, 'a.onnx')
    assert decoder is DECODERS['nanodet']
    boxes, scores, labels = decoder.read(outputs, THREE)
    np.testing.assert_allclose(boxes, expected_boxes, rtol=1e-5)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-6)
    assert labels is None


# ---------------------------------------------------------------------- chosen


def slow_choice(candidates, score_thr, iou, most):
    """The same by loops: a box goes if a better one of its class overlaps."""
    boxes, scores, _ = candidates
    every = sorted(
        (
            (float(scores[i, k]), i, k)
            for i in range(len(boxes))
            for k in range(scores.shape[1])
            if scores[i, k] >= score_thr
        ),
        key=lambda row: -row[0],
    )
    kept = []
    for score, i, k in every:
        if all(
            k != other or overlap(boxes[i], boxes[j]) <= iou
            for _, j, other in kept
        ):
            kept.append((score, i, k))
    return kept[:most]


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return both / (sum(areas) - both)


@pytest.mark.parametrize('most', [100, 5])
def test_suppression_against_a_loop(most):
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 40, (60, 2))
    boxes = np.hstack([corner, corner + rng.uniform(10, 40, (60, 2))])
    scores = rng.uniform(0, 1, (60, 2))
    candidates = Candidates(boxes.astype(np.float32), scores)
    found = chosen(candidates, score_thr=0.3, nms_iou=0.5, max_per_image=most)
    expected = slow_choice(candidates, 0.3, 0.5, most)
    assert len(expected) > 4
    np.testing.assert_allclose(found.scores, [s for s, _, _ in expected], 1e-6)
    assert found.labels.tolist() == [k for _, _, k in expected]
    assert (
        found.boxes == [boxes.astype('f')[i] for _, i, _ in expected]
    ).all()


def test_nothing_is_found():
    empty = Candidates(np.zeros((0, 4)), np.zeros((0, 3)))
    found = chosen(empty, score_thr=0.1, nms_iou=0.5, max_per_image=9)
    assert [part.shape for part in found] == [(0, 4), (0,), (0,)]


# ------------------------------------------------------------------ recognised


@pytest.mark.parametrize(
    ('shapes', 'classes', 'what'),
    [
        (dict(out=(25200, 85)), 3, 'fits no decoder that is known'),
        (dict(a=(4, 7), b=(9, 9, 9)), 3, 'fits no decoder that is known'),
        (dict(out=(300, 6)), 1, 'fits yolov5 and end_to_end'),
    ],
)
def test_outputs_that_no_decoder_or_several_fit(shapes, classes, what):
    with pytest.raises(ConfigError) as caught:
        find_decoder('auto', shapes, Setting(classes, (64, 64)), 'a.onnx')
    text = str(caught.value)
    name, shape = next(iter(shapes.items()))
    assert f'a.onnx has the outputs {name} (B, {shape[0]}, ' in text
    assert f'{classes} classes (K), which {what}' in text
    for decoder in ('mmdeploy: dets (B, N, 5)', 'yolo: (B, 4 + K, N)'):
        assert decoder in text


def test_a_decoder_that_does_not_fit():
    with pytest.raises(ConfigError, match="does not fit decoder='yolo'"):
        find_decoder('yolo', dict(out=(300, 6)), THREE, 'a.onnx')
    with pytest.raises(ConfigError, match='decoder must be one of auto, mmd'):
        find_decoder('ssd', {}, THREE, 'a.onnx')


def own(outputs, setting):
    return Candidates(outputs['x'] * setting.size[0], outputs['y'])


def test_a_function_of_ones_own():
    outputs = dict(x=np.array([[0, 0, 1, 1]]), y=np.array([[0, 0.5, 0]]))
    decoder, found = read(outputs, name=f'{__name__}:own')
    assert decoder.suppress
    assert found.boxes.tolist() == [[0, 0, 64, 64]]
    assert found.labels.tolist() == [1]
