"""DoGo's comparison of similarities beside its formula."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmkd.errors import ConfigError, ShapeError
from mmkd.losses import SimilarityKLLoss, similarity_kl


@pytest.fixture
def pairs():
    """Views of four images: of a network, and of a wider peer."""
    generator = torch.Generator().manual_seed(0)
    return [
        tuple(torch.randn(4, width, generator=generator) for _ in range(2))
        for width in (5, 8)
    ]


def distributions(views, temperature):
    rows = []
    for one in views[0].tolist():
        logits = []
        for other in views[1].tolist():
            dot = sum(a * b for a, b in zip(one, other, strict=True))
            cosine = dot / (math.hypot(*one) * math.hypot(*other))
            logits.append(math.exp(cosine / temperature))
        rows.append([value / sum(logits) for value in logits])
    return rows


@pytest.mark.parametrize('temperature', [0.1, 1.0])
def test_is_the_formula(pairs, temperature):
    ours, theirs = (distributions(p, temperature) for p in pairs)
    expected = [
        [q * math.log(q / p) for p, q in zip(a, b, strict=True)]
        for a, b in zip(ours, theirs, strict=True)
    ]
    found = similarity_kl(*pairs, temperature=temperature)
    torch.testing.assert_close(
        found, torch.tensor(expected), rtol=1e-3, atol=1e-5
    )
    assert (found.sum(1) > 0).all()
    total = sum(map(sum, expected))
    loss = SimilarityKLLoss(temperature=temperature, loss_weight=100.0)
    assert loss(*pairs).item() == pytest.approx(100 * total / 16, rel=1e-3)


def test_the_official_code(pairs):
    """NeurAI-Lab/DoGo, criterion/kl.py, whose mean is that of the pairs."""
    (zxs, zys), (zxt, zyt) = pairs
    sim_s = F.cosine_similarity(zxs[:, None], zys[None], dim=2) / 0.1
    sim_t = F.cosine_similarity(zxt[:, None], zyt[None], dim=2) / 0.1
    # its F.kl_div(..., reduction='mean')
    parts = sim_t.softmax(1) * (sim_t.log_softmax(1) - sim_s.log_softmax(1))
    expected = parts.sum() / 4**2
    torch.testing.assert_close(SimilarityKLLoss()(*pairs), expected)


def test_equal_networks_are_the_minimum(pairs):
    same = tuple(v.clone().requires_grad_() for v in pairs[0])
    longer = tuple(3 * v for v in pairs[0])
    loss = SimilarityKLLoss()(same, longer)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    for view in same:
        assert view.grad.abs().max() < 1e-6


def test_the_peer_gets_no_gradient(pairs):
    ours, theirs = (
        tuple(v.clone().requires_grad_() for v in pair) for pair in pairs
    )
    SimilarityKLLoss()(ours, theirs).backward()
    assert all(v.grad.abs().sum() > 0 for v in ours)
    assert all(v.grad is None for v in theirs)


def test_wrong_input(pairs):
    message = r'similarity_kl\.temperature must be above 0, got -1'
    with pytest.raises(ConfigError, match=message):
        similarity_kl(*pairs, temperature=-1)
    with pytest.raises(ConfigError, match=r'SimilarityKLLoss\.temperature'):
        SimilarityKLLoss(temperature=0)
    fewer = tuple(v[:3] for v in pairs[1])
    with pytest.raises(ShapeError, match='the same images'):
        similarity_kl(pairs[0], fewer)
