"""DIST on real detectors."""

import math

import pytest
import torch

from mmkd.errors import ConfigError
from mmkd.registry import METHODS
from mmkd.utils import build_checked
from tests.helpers import tiny_dense, toy
from tests.helpers import tiny_detectors as tiny
from tests.helpers.logit_pair import LogitPair, rows, seen_targets
from tests.helpers.loss_references import distances


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


def mean(values):
    return sum(values) / len(values)


HEADS = {
    'retinanet': tiny.retinanet(),
    'fcos': tiny.fcos(),
    'atss': tiny_dense.atss(),
    'gfl': tiny.gfl(),
}


@pytest.mark.parametrize('name', HEADS)
def test_the_positives_of_a_dense_head(name):
    pair = LogitPair('DIST', HEADS[name], beta=2.0, gamma=3.0, temperature=2.0)
    losses = pair.losses()
    labels, _, _ = seen_targets(pair)
    positive = (labels >= 0) & (labels < 3)
    s, t = (
        torch.cat(rows(model, pair.inputs), 1)[positive].div(2).sigmoid()
        for model in (pair.student, pair.teacher)
    )
    inter = mean(distances(s.tolist(), t.tolist()))
    intra = mean(distances(s.T.tolist(), t.T.tolist()))
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(
        dict(inter=8 * inter, intra=12 * intra), rel=1e-3
    )
    sum(losses.values()).backward()
    assert pair.student.backbone.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in pair.teacher.parameters())


def test_image_by_image():
    """With objects in one image, both are the same; in two, they differ."""
    alone = LogitPair('DIST', tiny.gfl(), per_image=True)
    joint = LogitPair('DIST', tiny.gfl())
    assert torch.equal(
        alone.losses(objects=(3, 0))['intra'],
        joint.losses(objects=(3, 0))['intra'],
    )
    losses = alone.losses(objects=(3, 2))
    labels, _, _ = seen_targets(alone)
    s, t = (
        torch.cat(rows(model, alone.inputs), 1).sigmoid()
        for model in (alone.student, alone.teacher)
    )
    expected = []
    for image, positive in enumerate((labels >= 0) & (labels < 3)):
        expected += distances(
            s[image, positive].T.tolist(), t[image, positive].T.tolist()
        )
    assert losses['intra'].item() == pytest.approx(mean(expected), rel=1e-3)
    assert losses['intra'] != joint.losses(objects=(3, 2))['intra']


def test_the_rois_of_a_two_stage_detector():
    """Softmax with the background, on two of the three classes."""
    pair = LogitPair(
        'DIST', tiny.faster_rcnn(), teacher_classes=('cow', 'sky', 'cat')
    )
    found, head = [], pair.student.roi_head.bbox_head
    original = head.loss_and_target

    def record(*args, **kwargs):
        found.append(kwargs)
        return original(*args, **kwargs)

    head.loss_and_target = record
    losses = pair.losses()
    del head.loss_and_target
    with torch.no_grad():
        theirs = pair.teacher.roi_head._bbox_forward(
            pair.teacher.extract_feat(pair.inputs), found[0]['rois']
        )['cls_score']
    s = found[0]['cls_score'].detach()[:, [0, 2, 3]].double().softmax(-1)
    t = theirs[:, [2, 0, 3]].double().softmax(-1)
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(
        dict(
            inter=mean(distances(s.tolist(), t.tolist())),
            intra=mean(distances(s.T.tolist(), t.T.tolist())),
        ),
        rel=1e-3,
    )


@pytest.mark.parametrize('config', [tiny.gfl(), tiny.retinanet()])
def test_an_equal_student_has_nothing_to_learn(config):
    pair = LogitPair('DIST', config)
    for module in pair.teacher.bbox_head.children():
        if isinstance(module, torch.nn.Conv2d):
            # Scores of .01 are so small that the epsilon is felt.
            torch.nn.init.zeros_(module.bias)
    pair.equal()
    for loss in pair.losses().values():
        assert loss.item() == pytest.approx(0, abs=1e-4)


def test_images_without_objects():
    losses = LogitPair('DIST', tiny.gfl()).losses(objects=(0, 0))
    assert [loss.item() for loss in losses.values()] == [0, 0]
    assert not any(math.isnan(loss) for loss in losses.values())


@pytest.mark.parametrize('config', [tiny.gfl(), tiny.faster_rcnn()])
def test_zero_weight_is_the_stock_loss(config):
    pair = LogitPair('DIST', config, loss_weight=0.0)
    assert toy.same(pair.step(), pair.stock_losses())


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(temperature=0), r'DIST.temperature must be above 0, got 0'),
        (dict(beta=-1), r'DIST.beta must be at least 0, got -1'),
        (dict(gamma=-0.5), r'DIST.gamma must be at least 0, got -0.5'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        build_checked(METHODS, dict(type='mmkd.DIST', **options), 'dist')


def test_one_class_has_no_relations():
    pair = LogitPair('DIST', tiny.gfl(), teacher_classes=('cat', 'sky', 'sea'))
    with pytest.raises(
        ConfigError, match=r'networks share 1 and no background'
    ):
        pair.losses()


def test_pairs_that_do_not_fit():
    with pytest.raises(
        ConfigError, match=r'DIST: the priors of the two dense'
    ):
        LogitPair('DIST', tiny.retinanet(), tiny.gfl())
