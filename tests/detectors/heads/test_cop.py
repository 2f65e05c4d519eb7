"""Conditional objectness against plain loops, and in real PAA training."""

import math

import pytest
import torch
import torch.nn.functional as F
from mmdet.models.losses import FocalLoss

from mmkd.core.distiller import build_distiller
from mmkd.detectors.heads.cop import conditional_objectness
from mmkd.detectors.logit import logit
from mmkd.errors import ConfigError
from tests.helpers import tiny_dense as dense
from tests.helpers import tiny_detectors as tiny

COP = dict(bbox_head__type='mmkd.COPHead')


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def cop(config=None):
    model = config or dense.paa()
    model.bbox_head.type = 'mmkd.COPHead'
    return model


def test_probability_by_loops():
    torch.manual_seed(0)
    classes, coefficients = torch.randn(2, 3, 4, 5), torch.randn(2, 9, 4, 5)
    found = conditional_objectness(classes, coefficients)
    for b in range(2):
        for c in range(3):
            for y in range(4):
                for x in range(5):
                    total = 0.0
                    for k in range(9):
                        v, u = y + k // 3 - 1, x + k % 3 - 1
                        if 0 <= v < 4 and 0 <= u < 5:
                            total += sigmoid(
                                classes[b, c, v, u].item()
                            ) * sigmoid(coefficients[b, k, y, x].item())
                    assert found[b, c, y, x].item() == pytest.approx(
                        total / 9, rel=1e-5
                    )


def windowed(classes, coefficients):
    """The official mean over the windows; beyond the border it is 0."""
    height, width = classes.shape[2:]
    padded = F.pad(classes.sigmoid(), (1, 1, 1, 1))
    weights = coefficients.sigmoid()
    total = 0
    for k in range(9):
        y, x = divmod(k, 3)
        shifted = padded[:, :, y : y + height, x : x + width]
        total = total + shifted * weights[:, k : k + 1]
    return total / 9


def prob_focal(p, target, alpha=0.25, gamma=2.0):
    """The official ProbFocalLoss of probabilities, element by element."""
    wrong = (1 - p) * target + p * (1 - target)
    factor = alpha * target + (1 - alpha) * (1 - target)
    entropy = F.binary_cross_entropy(p, target, reduction='none')
    return factor * wrong**gamma * entropy


def rows_of(maps):
    """(B, C, H, W) as (B * H * W, C), as PAA's loss takes it."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


class TestOfficialCode:
    """Values and gradients of PAA_COP_Head with ProbFocalLoss."""

    labels = torch.arange(2 * 4 * 5) % 4  # 3 is the background

    def targets(self):
        return F.one_hot(self.labels, 4)[:, :3].float()

    @pytest.mark.parametrize('shift', [-24, -16, -8, 0, 4])
    def test_values_and_gradients(self, shift):
        torch.manual_seed(0)
        classes = (torch.randn(2, 3, 4, 5) + shift).requires_grad_()
        coefficients = torch.randn(2, 9, 4, 5).requires_grad_()
        logits = logit(conditional_objectness(classes, coefficients))
        ours = FocalLoss(reduction='sum')(rows_of(logits), self.labels)
        p = rows_of(windowed(classes, coefficients))
        theirs = prob_focal(p, self.targets()).sum()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        found, expected = (
            torch.autograd.grad(loss, (classes, coefficients))
            for loss in (ours, theirs)
        )
        assert all(gradient.abs().max() > 1e-3 for gradient in expected)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize('z', [-13.0, -15.0, -20.0, -25.0])
    def test_a_positive_of_tiny_probability_learns(self, z):
        """By hand: d/dz of -.25 log p is -.25 where the 9 cells are alike."""
        classes = torch.full((1, 1, 3, 3), z, requires_grad=True)
        coefficients = torch.zeros(1, 9, 3, 3)
        p = conditional_objectness(classes, coefficients)
        loss = FocalLoss(reduction='none')(
            rows_of(logit(p)), torch.tensor([1, 1, 1, 1, 0, 1, 1, 1, 1])
        )
        loss[4].sum().backward()
        assert classes.grad.sum().item() == pytest.approx(-0.25, rel=1e-3)

    def test_through_the_head(self):
        """Both towers, from biases at which hardly anything is an object."""
        head = dense.build(cop(), seed=1).bbox_head
        with torch.no_grad():
            head.atss_cls.bias.fill_(-18.0)
            head.cop_coefficients.bias.fill_(-3.0)
        classes = coefficients = torch.randn(2, 16, 4, 5)
        logits, *_ = head.forward_single(classes, head.scales[0])
        ours = head.loss_cls(
            rows_of(logits), self.labels, reduction_override='sum'
        )
        for layer in head.cls_convs:
            classes = layer(classes)
        for layer in head.reg_convs:
            coefficients = layer(coefficients)
        p = windowed(
            head.atss_cls(classes), head.cop_coefficients(coefficients)
        )
        assert p.max() < 1e-6
        theirs = prob_focal(rows_of(p), self.targets()).sum()
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
        parameters = [
            head.atss_cls.bias,
            head.cop_coefficients.bias,
            next(head.cls_convs.parameters()),
        ]
        found, expected = (
            torch.autograd.grad(loss, parameters) for loss in (ours, theirs)
        )
        assert all(gradient.abs().max() > 0.01 for gradient in expected)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_scores_are_probabilities_times_iou():
    """Through the stock prediction, which takes a sigmoid."""
    model = dense.build(cop(), seed=3).eval()
    inputs, samples = tiny.batch_for(model, sizes=((160, 192),))
    model.bbox_head.with_score_voting = False
    model.test_cfg.score_thr = model.bbox_head.test_cfg.score_thr = 0.0
    with torch.no_grad():
        logits, _, ious = model.bbox_head(model.extract_feat(inputs))
        results = model.predict(inputs, samples, rescale=False)
    best = results[0].pred_instances.scores.max().item()
    expected = max(
        math.sqrt((z.sigmoid().amax(1) * q.sigmoid()[:, 0]).max().item())
        for z, q in zip(logits, ious, strict=True)
    )
    assert best == pytest.approx(expected, rel=1e-4)


def test_it_trains_and_is_distilled():
    student = dense.build(cop(), seed=1)
    distiller = build_distiller(
        dict(
            teacher=dict(config=dict(model=dense.paa()), checkpoint=None),
            methods=dict(lad=dict(type='mmkd.LabelAssignmentDistillation')),
        ),
        student,
        tiny.CLASSES,
    )
    batch = tiny.batch_for(student, sizes=((160, 192), (160, 192)))
    distiller.attach()
    losses = tiny.seeded_loss(student, *batch)
    distiller.detach()
    sum(losses.values()).backward()
    gradient = student.bbox_head.cop_coefficients.weight.grad
    assert gradient.abs().sum() > 0
    assert all(p.grad is not None for p in student.parameters())


def test_weights_of_paa_fit_but_for_the_coefficients():
    model = dense.build(cop())
    missing, unexpected = model.load_state_dict(
        dense.build(dense.paa()).state_dict(), strict=False
    )
    assert not unexpected
    assert missing == [
        'bbox_head.cop_coefficients.weight',
        'bbox_head.cop_coefficients.bias',
    ]


def test_several_anchors():
    config = cop()
    config.bbox_head.anchor_generator.scales_per_octave = 2
    with pytest.raises(ConfigError, match='one anchor'):
        dense.build(config)
