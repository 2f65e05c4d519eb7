"""Decoupled knowledge distillation on real detectors."""

import pytest
import torch
import torch.nn.functional as F

from mmkd.errors import ConfigError
from mmkd.registry import METHODS
from mmkd.utils import build_checked
from tests.helpers import tiny_dense, toy
from tests.helpers import tiny_detectors as tiny
from tests.helpers.logit_pair import LogitPair, rows, seen_targets
from tests.helpers.loss_references import decoupled


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


HEADS = {
    'retinanet': tiny.retinanet(),
    'fcos': tiny.fcos(),
    'atss': tiny_dense.atss(),
    'gfl': tiny.gfl(),
}


@pytest.mark.parametrize('name', HEADS)
def test_the_positives_of_a_dense_head(name):
    pair = LogitPair('DKD', HEADS[name], alpha=2.0, beta=3.0, temperature=4.0)
    losses = pair.losses()
    labels, weights, avg_factor = seen_targets(pair)
    ours, theirs = (
        torch.cat(rows(model, pair.inputs), 1)
        for model in (pair.student, pair.teacher)
    )
    totals = [0.0, 0.0]
    for image, prior in ((labels >= 0) & (labels < 3)).nonzero().tolist():
        parts = decoupled(
            ours[image, prior].tolist(),
            theirs[image, prior].tolist(),
            labels[image, prior].item(),
            4.0,
            sigmoid=True,
        )
        weight = weights[image, prior].item()
        totals = [a + weight * b for a, b in zip(totals, parts, strict=True)]
    assert min(totals) > 0.1
    factor = float(avg_factor)
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(
        dict(target=2 * totals[0] / factor, others=3 * totals[1] / factor),
        rel=1e-3,
    )
    sum(losses.values()).backward()
    assert pair.student.backbone.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in pair.teacher.parameters())


def roi_step(pair):
    """The method's losses, both networks' RoI logits, and the labels."""
    found, head = [], pair.student.roi_head.bbox_head
    original = head.loss_and_target

    def record(*args, **kwargs):
        result = original(*args, **kwargs)
        found.append((kwargs, result['bbox_targets'][0]))
        return result

    head.loss_and_target = record
    losses = pair.losses()
    del head.loss_and_target
    (call, labels), *_ = found
    with torch.no_grad():
        theirs = pair.teacher.roi_head._bbox_forward(
            pair.teacher.extract_feat(pair.inputs), call['rois']
        )['cls_score']
    return losses, call['cls_score'], theirs, labels


def official_dkd(student, teacher, target, alpha, beta, temperature):
    """The official dkd_loss, from its formula: masks and logarithms."""
    mask = torch.zeros_like(student).scatter(1, target[:, None], 1).bool()

    def joined(logits):
        p = (logits / temperature).softmax(1)
        return torch.stack([(p * mask).sum(1), (p * ~mask).sum(1)], 1)

    def divergence(log_student, p_teacher):
        total = F.kl_div(log_student, p_teacher, reduction='sum')
        return total * temperature**2 / len(target)

    without = 1000.0 * mask
    target_part = divergence(joined(student).log(), joined(teacher))
    other_part = divergence(
        (student / temperature - without).log_softmax(1),
        (teacher / temperature - without).softmax(1),
    )
    return alpha * target_part + beta * other_part


class TestOfficialCode:
    """Values and gradients of mdistiller's rcnn_dkd_loss."""

    def test_the_defaults_are_those_for_detectors(self):
        """``KD.DKD`` in detection/model/config.py."""
        pair = LogitPair('DKD', tiny.faster_rcnn())
        losses, ours, theirs, labels = roi_step(pair)
        expected = official_dkd(ours, theirs, labels, 1.0, 0.25, 1.0)
        found = sum(losses.values())
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)
        head = pair.student.roi_head.bbox_head
        parameters = [*head.fc_cls.parameters(), *head.shared_fcs.parameters()]
        gradients, references = (
            torch.autograd.grad(loss, parameters, retain_graph=True)
            for loss in (found, expected)
        )
        for gradient, reference in zip(gradients, references, strict=True):
            scale = reference.abs().max()
            assert scale > 0
            torch.testing.assert_close(
                gradient / scale, reference / scale, rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize(
    ('teacher_classes', 'columns'),
    [
        (tiny.CLASSES, ([0, 1, 2, 3], [0, 1, 2, 3])),
        (('cow', 'sky', 'cat'), ([0, 2, 3], [2, 0, 3])),
    ],
)
def test_the_rois_of_a_two_stage_detector(teacher_classes, columns):
    """The background counts; RoIs of what the teacher does not know don't."""
    pair = LogitPair(
        'DKD',
        tiny.faster_rcnn(),
        teacher_classes=teacher_classes,
        beta=8.0,
        temperature=4.0,
    )
    losses, ours, theirs, labels = roi_step(pair)
    totals, known = [0.0, 0.0], 0
    for s, t, label in zip(
        ours.tolist(),
        theirs.tolist(),
        labels.tolist(),
        strict=True,
    ):
        if label in columns[0]:
            known += 1
            parts = decoupled(
                [s[c] for c in columns[0]],
                [t[c] for c in columns[1]],
                columns[0].index(label),
                4.0,
                sigmoid=False,
            )
            totals = [a + b for a, b in zip(totals, parts, strict=True)]
    assert (known == len(labels)) == (teacher_classes == tiny.CLASSES)
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(
        dict(
            target=totals[0] / len(labels), others=8 * totals[1] / len(labels)
        ),
        rel=1e-3,
    )


@pytest.mark.parametrize('config', [tiny.gfl(), tiny.retinanet()])
def test_an_equal_student_has_nothing_to_learn(config):
    pair = LogitPair('DKD', config)
    pair.equal()
    assert [loss.item() for loss in pair.losses().values()] == [0, 0]


def test_images_without_objects():
    losses = LogitPair('DKD', tiny.gfl()).losses(objects=(0, 0))
    assert [loss.item() for loss in losses.values()] == [0, 0]


@pytest.mark.parametrize('config', [tiny.gfl(), tiny.faster_rcnn()])
def test_zero_weight_is_the_stock_loss(config):
    pair = LogitPair('DKD', config, loss_weight=0.0)
    assert toy.same(pair.step(), pair.stock_losses())


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(temperature=0), r'DKD.temperature must be above 0, got 0'),
        (dict(alpha=-1), r'DKD.alpha must be at least 0, got -1'),
        (dict(beta=-0.5), r'DKD.beta must be at least 0, got -0.5'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        build_checked(METHODS, dict(type='mmkd.DKD', **options), 'dkd')


def test_too_few_classes():
    """One class against the background is KD, a sigmoid's two classes too."""
    one = ('cat', 'sky', 'sea')
    pair = LogitPair('DKD', tiny.faster_rcnn(), teacher_classes=one)
    with pytest.raises(
        ConfigError,
        match=r'two classes besides the target; the networks share 1 and a ba',
    ):
        pair.losses()
    pair = LogitPair('DKD', tiny.gfl(), teacher_classes=('cat', 'cow', 'sea'))
    with pytest.raises(ConfigError, match=r'share 2 and no background column'):
        pair.losses()


def test_pairs_that_do_not_fit():
    with pytest.raises(ConfigError, match=r'DKD: the priors of the two dense'):
        LogitPair('DKD', tiny.retinanet(), tiny.gfl())
