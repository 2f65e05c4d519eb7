"""SimCLR's loss beside its formula, term by term."""

import math

import pytest
import torch

from mmkd.errors import ConfigError, ShapeError
from mmkd.losses import NTXentLoss, nt_xent_loss


def reference(first, second, temperature):
    """The loss of each view, in plain Python floats."""
    views = [*first.tolist(), *second.tolist()]
    count = len(views) // 2

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / (math.hypot(*a) * math.hypot(*b))

    losses = []
    for i, view in enumerate(views):
        partner = (i + count) % len(views)
        terms = {
            k: math.exp(cosine(view, other) / temperature)
            for k, other in enumerate(views)
            if k != i
        }
        losses.append(-math.log(terms[partner] / sum(terms.values())))
    return losses


@pytest.fixture
def views():
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(5, 7, generator=generator) for _ in range(2)]


@pytest.mark.parametrize('temperature', [0.1, 0.5, 2.0])
def test_is_the_formula(views, temperature):
    found = nt_xent_loss(*views, temperature=temperature)
    expected = reference(*views, temperature)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    mean = NTXentLoss(temperature=temperature)(*views).item()
    assert mean == pytest.approx(sum(expected) / 10, rel=1e-5)


def test_the_official_code_s_halves_add_up_to_twice_the_mean(views):
    """google-research/simclr lowers the logit of the view itself by 1e9."""
    a, b = (v / v.norm(dim=1, keepdim=True) for v in views)
    labels = torch.arange(5)
    lowered = 1e9 * torch.eye(5)
    halves = []
    for one, other in ((a, b), (b, a)):
        logits = torch.cat(
            [one @ other.T / 0.1, one @ one.T / 0.1 - lowered], dim=1
        )
        halves.append(-logits.log_softmax(1)[labels, labels].mean())
    assert 2 * NTXentLoss()(*views).item() == pytest.approx(
        sum(halves).item(), rel=1e-5
    )


def test_length_does_not_matter(views):
    longer = [views[0] * torch.rand(5, 1).add(0.5), 10 * views[1]]
    torch.testing.assert_close(nt_xent_loss(*longer), nt_xent_loss(*views))


def test_perfect_views_of_images_that_are_opposite():
    """Each view has its partner at 1, and two others at -1."""
    views = torch.tensor([[2.0, 0.0], [-1.0, 0.0]])
    loss = NTXentLoss(temperature=0.5)(views, views)
    assert loss.item() == pytest.approx(math.log(1 + 2 * math.exp(-4)))


def test_both_views_are_pulled_together(views):
    first, second = (v.clone().requires_grad_() for v in views)
    NTXentLoss(temperature=0.5)(first, second).backward()
    before = torch.cosine_similarity(first, second).mean()
    with torch.no_grad():
        moved = [v - 5 * v.grad for v in (first, second)]
    assert torch.cosine_similarity(*moved).mean() > before


def test_gradient_equals_finite_differences(views):
    first, second = (v.double().requires_grad_() for v in views)

    def mean(a, b):  # the loss computes in single precision
        unit = torch.nn.functional.normalize(torch.cat([a, b]), dim=1)
        logits = (unit @ unit.T / 0.5).masked_fill(
            torch.eye(10, dtype=torch.bool), -torch.inf
        )
        partner = (torch.arange(10) + 5) % 10
        return -logits.log_softmax(1)[torch.arange(10), partner].mean()

    assert torch.autograd.gradcheck(mean, (first, second))
    exact = torch.autograd.grad(mean(first, second), (first, second))
    ours = [v.detach().float().requires_grad_() for v in (first, second)]
    NTXentLoss(temperature=0.5)(*ours).backward()
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.grad, b.float(), rtol=1e-4, atol=1e-6)


def test_weights_and_reductions(views):
    each = nt_xent_loss(*views)
    weight = torch.rand(10)
    loss = NTXentLoss()
    close = torch.testing.assert_close
    close(loss(*views, weight), (each * weight).mean())
    close(loss(*views, avg_factor=4), each.sum() / 4)
    close(loss(*views, reduction_override='none'), each)
    close(NTXentLoss(loss_weight=3.0)(*views), 3 * each.mean())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(views, dtype):
    half = [v.to(dtype) for v in views]
    found = nt_xent_loss(*half, temperature=0.01)
    assert found.dtype == torch.float32
    expected = reference(*(v.float() for v in half), 0.01)
    assert found.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_wrong_input():
    message = r'nt_xent_loss\.temperature must be above 0, got 0'
    with pytest.raises(ConfigError, match=message):
        nt_xent_loss(torch.ones(2, 2), torch.ones(2, 2), temperature=0)
    with pytest.raises(ConfigError, match=r'NTXentLoss\.temperature'):
        NTXentLoss(temperature=-1.0)
    with pytest.raises(ShapeError, match='Both are views of the same'):
        nt_xent_loss(torch.ones(2, 2), torch.ones(3, 2))
    with pytest.raises(ShapeError, match='batches of at least 2 images'):
        nt_xent_loss(torch.ones(1, 2), torch.ones(1, 2))
