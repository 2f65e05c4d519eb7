"""PKD: Pearson correlation."""

import pytest
import torch

from mmkd.methods import PKD
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


def official_norm(feat):
    """Each channel over (B, H, W), with PyTorch's unbiased deviation."""
    mean = feat.mean((0, 2, 3), keepdim=True)
    return (feat - mean) / (feat.std((0, 2, 3), keepdim=True) + 1e-6)


class TestOfficialCode:
    """Values and gradients of MMRazor's PKDLoss, on images without padding."""

    @pytest.mark.parametrize(
        ('student', 'official'),
        [
            (tiny.faster_rcnn(), PKD.official[0]),
            (tiny.retinanet(), PKD.official[1]),
        ],
        ids=['faster_rcnn', 'retinanet'],
    )
    def test_values_and_gradients(self, student, official):
        pair = FeaturePair('PKD', student, **official.options)
        loss = pair.step(sizes=((128, 160), (128, 160)))['pkd']
        ours = pair.student.extract_feat(pair.inputs)
        with torch.no_grad():
            theirs = pair.teacher.extract_feat(pair.inputs)
        weight = 6 if student.type == 'FasterRCNN' else 10
        expected = 0
        for s, t in list(zip(ours, theirs, strict=True))[:4]:
            error = (official_norm(s) - official_norm(t)) ** 2
            positions = s[:, 0].numel()
            biased = positions / (positions - 1)  # see `differs`
            expected = expected + weight * biased * error.mean() / 2
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        # the mean does not count: the biases' gradients are rounding
        parameters = [
            p for p in pair.student.neck.parameters() if p.dim() == 4
        ]
        found, reference = (
            torch.autograd.grad(value, parameters, allow_unused=True)
            for value in (loss, expected)
        )
        for gradient, other in zip(found, reference, strict=True):
            if other is None:
                assert gradient is None
            else:
                scale = other.abs().max()
                torch.testing.assert_close(
                    gradient / scale, other / scale, rtol=1e-3, atol=1e-4
                )


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
