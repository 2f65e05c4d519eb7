"""PKD: Pearson correlation."""

import pytest

from tests.helpers import tiny_detectors as tiny
from tests.helpers.feature_maps import (
    FeaturePair,
    images_of,
    twin,
)
from tests.helpers.loss_references import anticorrelation


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


@pytest.mark.parametrize('per_image', [False, True])
def test_on_detectors(per_image):
    pair = FeaturePair(
        'PKD',
        tiny.faster_rcnn(),
        per_image=per_image,
        loss_weight=2.0,
        levels=[0, 1],
    )
    losses = pair.step(sizes=((96, 128), (64, 96)))
    ours, theirs = pair.features()
    expected = sum(
        anticorrelation(
            images_of(s, pair.samples), images_of(t, pair.samples), per_image
        )
        for s, t in zip(ours[:2], theirs[:2], strict=True)
    )
    assert losses.keys() == {'pkd'}
    assert losses['pkd'].item() == pytest.approx(2 * expected, rel=1e-4)


def test_between_detectors_of_different_kinds():
    """The pair of the paper: FCOS teaches RetinaNet."""
    pair = FeaturePair('PKD', tiny.retinanet(), tiny.fcos())
    assert 0 < pair.step()['pkd'] / 6 / 5 < 2


def test_the_teacher_itself_is_the_minimum():
    pair = FeaturePair('PKD')
    assert pair.step()['pkd'] > 0
    twin(pair)
    assert pair.step()['pkd'] == 0


def test_defaults():
    method = FeaturePair('PKD').method
    assert (method.loss_weight, method.per_image) == (6.0, False)
