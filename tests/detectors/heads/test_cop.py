"""Conditional objectness against plain loops, and in real PAA training."""

import math

import pytest
import torch

from mmkd.core.distiller import build_distiller
from mmkd.detectors.heads.cop import conditional_objectness
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
