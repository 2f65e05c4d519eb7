"""Decoupled knowledge distillation on real detectors."""

import math

import pytest
import torch

from mmkd.errors import ConfigError
from mmkd.methods import DKD
from mmkd.methods.class_logits import ClassLogits
from mmkd.registry import METHODS
from mmkd.utils import build_checked
from tests.helpers import tiny_dense, toy
from tests.helpers import tiny_detectors as tiny
from tests.helpers.logit_pair import Pair, rows, seen_targets


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


def softmax(logits, temperature):
    top = max(logits)
    powers = [math.exp((z - top) / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def two(p):
    return [p, 1 - p]


def decoupled(student, teacher, y, temperature, *, sigmoid):
    """TCKD and NCKD of one box as the paper writes them."""
    if sigmoid:
        p, p_t = (
            1 / (1 + math.exp(-z[y] / temperature)) for z in (student, teacher)
        )
    else:
        p, p_t = (softmax(z, temperature)[y] for z in (student, teacher))
    others, others_t = (
        softmax([v for c, v in enumerate(z) if c != y], temperature)
        for z in (student, teacher)
    )
    return (
        temperature**2 * kl(two(p_t), two(p)),
        temperature**2 * kl(others_t, others),
    )


def pair_of(student, teacher, labels, *, sigmoid=False):
    return ClassLogits(
        prefix='',
        student=student,
        teacher=teacher,
        sigmoid=sigmoid,
        labels=torch.tensor(labels),
        weights=torch.ones(len(labels)),
        images=torch.zeros(len(labels)).long(),
        avg_factor=float(len(labels)),
        classes=student.shape[1],
    )


@pytest.mark.parametrize('sigmoid', [False, True])
@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_the_two_parts(sigmoid, temperature):
    generator = torch.Generator().manual_seed(0)
    z, z_t = (5 * torch.randn(6, 4, generator=generator) for _ in range(2))
    labels = [0, 1, 2, 3, 0, 2]
    parts = DKD(temperature=temperature)._parts(
        pair_of(z, z_t, labels, sigmoid=sigmoid)
    )
    for row, y in enumerate(labels):
        expected = decoupled(
            z[row].tolist(),
            z_t[row].tolist(),
            y,
            temperature,
            sigmoid=sigmoid,
        )
        found = [part[row].item() for part in parts]
        assert found == pytest.approx(list(expected), rel=1e-4, abs=1e-6)


def test_together_they_are_kd():
    """Eq. 7 of the paper: KD = TCKD + (1 - p^t_y) NCKD."""
    generator = torch.Generator().manual_seed(1)
    z, z_t = (torch.randn(5, 4, generator=generator) for _ in range(2))
    labels = [3, 0, 2, 1, 1]
    target, others = DKD(temperature=2.0)._parts(pair_of(z, z_t, labels))
    for row, y in enumerate(labels):
        p, p_t = (softmax(x[row].tolist(), 2.0) for x in (z, z_t))
        combined = target[row] + (1 - p_t[y]) * others[row]
        assert combined.item() == pytest.approx(4 * kl(p_t, p), rel=1e-4)


def test_by_hand():
    """Target 3/4 against 1/2; the others 1/2, 1/2 in both."""
    z = torch.tensor([[math.log(2.0), 0.0, 0.0]])
    z_t = torch.tensor([[math.log(6.0), 0.0, 0.0]])
    target, others = DKD(temperature=1.0)._parts(pair_of(z, z_t, [0]))
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert target.item() == pytest.approx(expected)
    assert others.item() == pytest.approx(0, abs=1e-7)


def test_the_targets_logit_does_not_enter_the_other_part():
    z = torch.tensor([[3.0, 1.0, 0.0]], requires_grad=True)
    _, others = DKD()._parts(pair_of(z, torch.tensor([[0.0, 0.0, 1.0]]), [0]))
    others.sum().backward()
    assert z.grad[0, 0] == 0
    assert z.grad[0, 1] > 0 > z.grad[0, 2]


HEADS = {
    'retinanet': tiny.retinanet(),
    'fcos': tiny.fcos(),
    'atss': tiny_dense.atss(),
    'gfl': tiny.gfl(),
}


@pytest.mark.parametrize('name', HEADS)
def test_the_positives_of_a_dense_head(name):
    pair = Pair('DKD', HEADS[name], alpha=2.0, beta=3.0, temperature=4.0)
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


@pytest.mark.parametrize(
    ('teacher_classes', 'columns'),
    [
        (tiny.CLASSES, ([0, 1, 2, 3], [0, 1, 2, 3])),
        (('cow', 'sky', 'cat'), ([0, 2, 3], [2, 0, 3])),
    ],
)
def test_the_rois_of_a_two_stage_detector(teacher_classes, columns):
    """The background counts; RoIs of what the teacher does not know don't."""
    pair = Pair('DKD', tiny.faster_rcnn(), teacher_classes=teacher_classes)
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
    totals, known = [0.0, 0.0], 0
    for s, t, label in zip(
        call['cls_score'].tolist(),
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
    pair = Pair('DKD', config)
    pair.equal()
    assert [loss.item() for loss in pair.losses().values()] == [0, 0]


def test_images_without_objects():
    losses = Pair('DKD', tiny.gfl()).losses(objects=(0, 0))
    assert [loss.item() for loss in losses.values()] == [0, 0]


@pytest.mark.parametrize('config', [tiny.gfl(), tiny.faster_rcnn()])
def test_zero_weight_is_the_stock_loss(config):
    pair = Pair('DKD', config, loss_weight=0.0)
    assert toy.same(pair.step(), pair.stock_losses())


def test_half_precision():
    """Masked logits stay within the range of the computation."""
    z, z_t = (torch.randn(4, 5).half() for _ in range(2))
    target, others = DKD()._parts(pair_of(z, z_t, [0, 1, 2, 3]))
    assert target.isfinite().all()
    assert others.isfinite().all()
    assert target.dtype == torch.float32


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
    pair = Pair('DKD', tiny.faster_rcnn(), teacher_classes=one)
    with pytest.raises(
        ConfigError,
        match=r'two classes beside the target, the networks share 1 and a ba',
    ):
        pair.losses()
    pair = Pair('DKD', tiny.gfl(), teacher_classes=('cat', 'cow', 'sea'))
    with pytest.raises(ConfigError, match=r'share 2 and no background column'):
        pair.losses()


def test_pairs_that_do_not_fit():
    with pytest.raises(ConfigError, match=r'DKD: the priors of the two dense'):
        Pair('DKD', tiny.retinanet(), tiny.gfl())
