"""PKD: Pearson correlation."""

import math
import statistics

import pytest
import torch

from mmkd.methods.pkd import anticorrelation
from tests.helpers import tiny_detectors as tiny
from tests.helpers.feature_maps import (
    Pair,
    images_of,
    random_maps,
    twin,
    weights_of,
)

SIZES = [(5, 6), (3, 6), (2, 2)]


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


def pearson(ours, theirs):
    """The correlation of two lists of numbers, from its definition."""
    a, b = statistics.fmean(ours), statistics.fmean(theirs)
    together = sum(
        (x - a) * (y - b) for x, y in zip(ours, theirs, strict=True)
    )
    alone = sum((x - a) ** 2 for x in ours) * sum((y - b) ** 2 for y in theirs)
    return together / math.sqrt(alone)


def channels(images):
    """Each channel's values over a list of images (C, h, w)."""
    return [
        [v for image in images for v in image[c].flatten().tolist()]
        for c in range(len(images[0]))
    ]


def reference(ours, theirs, per_image):
    """The mean of 1 - r over channels, of the batch or of each image."""
    batches = [(ours, theirs)]
    if per_image:
        batches = [([s], [t]) for s, t in zip(ours, theirs, strict=True)]
    return statistics.fmean(
        1 - pearson(a, b)
        for s, t in batches
        for a, b in zip(channels(s), channels(t), strict=True)
    )


def cut(maps):
    return [
        m[:, :h, :w].double() for m, (h, w) in zip(maps, SIZES, strict=True)
    ]


def test_by_hand():
    """R of (0, 1, 2) and (0, 2, 1) is a half."""
    student = torch.tensor([0.0, 1.0, 2.0]).view(1, 1, 1, 3)
    teacher = torch.tensor([0.0, 20.0, 10.0]).view(1, 1, 1, 3)
    weights = weights_of([(1, 3)], 1, 3)
    loss = anticorrelation(student, teacher, weights, per_image=False)
    assert loss.item() == pytest.approx(0.5)
    loss = anticorrelation(-teacher, teacher, weights, per_image=False)
    assert loss.item() == pytest.approx(2.0)


@pytest.mark.parametrize('per_image', [False, True])
def test_the_formula(per_image):
    student, teacher = (random_maps(3, 4, 5, 6, seed=n) for n in (1, 2))
    # Images of other brightness: the two forms differ.
    student = student + torch.tensor([0.0, 3.0, -2.0]).view(3, 1, 1, 1)
    loss = anticorrelation(
        student, teacher, weights_of(SIZES, 5, 6), per_image=per_image
    )
    expected = reference(cut(student), cut(teacher), per_image)
    other = reference(cut(student), cut(teacher), not per_image)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert abs(expected - other) > 1e-3


def test_the_official_form_is_this_but_for_the_unbiased_deviation():
    """Half the MSE of maps standardised over (B, H, W)."""
    student, teacher = (random_maps(3, 4, 8, 9, seed=n) for n in (1, 2))
    weights = weights_of([(8, 9)] * 3, 8, 9)
    loss = anticorrelation(student, teacher, weights, per_image=False)
    ours, theirs = (
        (m - m.mean((0, 2, 3), keepdim=True)) / m.std((0, 2, 3), keepdim=True)
        for m in (student.double(), teacher.double())
    )
    positions = 3 * 8 * 9
    official = ((ours - theirs) ** 2).mean() / 2
    assert loss.item() == pytest.approx(
        official.item() * positions / (positions - 1), rel=1e-5
    )


@pytest.mark.parametrize('per_image', [False, True])
def test_the_scale_of_a_channel_does_not_matter(per_image):
    teacher = random_maps(3, 4, 5, 6)
    factor = random_maps(1, 4, 1, 1, seed=3).abs() + 0.1
    student = factor * teacher + random_maps(1, 4, 1, 1, seed=4)
    weights = weights_of(SIZES, 5, 6)
    loss = anticorrelation(student, teacher, weights, per_image=per_image)
    assert loss.abs() < 1e-5


@pytest.mark.parametrize('per_image', [False, True])
@pytest.mark.parametrize('value', [0, 0.37, 3.3, 123.4, -1e4])
@pytest.mark.parametrize('dead', ['student', 'teacher'])
def test_a_dead_channel_neither_breaks_nor_learns(dead, value, per_image):
    """Its rounding is no pattern; the other channel learns as alone."""
    maps = {
        role: random_maps(2, 2, 50, 67, seed=n)
        for n, role in enumerate(('student', 'teacher'))
    }
    maps[dead][:, 0] = value
    maps['student'].requires_grad_()
    weights = weights_of([(50, 67), (41, 60)], 50, 67)
    loss = anticorrelation(**maps, weights=weights, per_image=per_image)
    loss.backward()
    ours, theirs = (m.detach()[:, 1:] for m in maps.values())
    alone = anticorrelation(ours, theirs, weights, per_image=per_image)
    assert loss.item() == pytest.approx((0.5 + alone.item()) / 2, abs=1e-5)
    gradient = maps['student'].grad.abs().amax((0, 2, 3))
    assert gradient[0] < 1e-5 * gradient[1]


def test_a_faint_pattern_is_one():
    """One thousandth of a channel's mean correlates as the whole does."""
    student, teacher = (random_maps(2, 2, 20, 30, seed=n) for n in (1, 2))
    weights = weights_of([(20, 30)] * 2, 20, 30)
    loss, faint = (
        anticorrelation(s, teacher, weights, per_image=False)
        for s in (student, 100 + 0.1 * student)
    )
    assert faint.item() == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize('per_image', [False, True])
def test_on_detectors(per_image):
    pair = Pair(
        'PKD',
        tiny.faster_rcnn(),
        per_image=per_image,
        loss_weight=2.0,
        levels=[0, 1],
    )
    losses = pair.step(sizes=((96, 128), (64, 96)))
    ours, theirs = pair.features()
    expected = sum(
        reference(
            images_of(s, pair.samples), images_of(t, pair.samples), per_image
        )
        for s, t in zip(ours[:2], theirs[:2], strict=True)
    )
    assert losses.keys() == {'pkd'}
    assert losses['pkd'].item() == pytest.approx(2 * expected, rel=1e-4)


def test_between_detectors_of_different_kinds():
    """The pair of the paper: FCOS teaches RetinaNet."""
    pair = Pair('PKD', tiny.retinanet(), tiny.fcos())
    assert 0 < pair.step()['pkd'] / 6 / 5 < 2


def test_the_teacher_itself_is_the_minimum():
    pair = Pair('PKD')
    assert pair.step()['pkd'] > 0
    twin(pair)
    assert pair.step()['pkd'] == 0


def test_defaults():
    method = Pair('PKD').method
    assert (method.loss_weight, method.per_image) == (6.0, False)
