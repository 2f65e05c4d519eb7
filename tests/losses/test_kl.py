"""Divergences of logits."""

import math

import pytest
import torch
from mmdet.models.losses import KnowledgeDistillationKLDivLoss

from mmkd.errors import ConfigError, ShapeError
from mmkd.losses import (
    BinaryProblems,
    SigmoidKLLoss,
    SoftmaxKLLoss,
    sigmoid_kl,
    softmax_kl,
)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def softmax(logits, temperature):
    powers = [math.exp(z / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


def sigmoid(logit, temperature):
    p = 1 / (1 + math.exp(-logit / temperature))
    return [p, 1 - p]


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [4 * torch.randn(5, 3, generator=generator) for _ in range(2)]


@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
def test_softmax(logits, temperature):
    student, teacher = logits
    result = softmax_kl(student, teacher, temperature)
    assert result.shape == (5,)
    for row, s, t in zip(result, student, teacher, strict=True):
        expected = temperature**2 * kl(
            softmax(t.tolist(), temperature), softmax(s.tolist(), temperature)
        )
        assert row.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
def test_sigmoid(logits, temperature):
    student, teacher = (z.flatten() for z in logits)
    result = sigmoid_kl(student, teacher, temperature)
    for value, s, t in zip(
        result.tolist(), student.tolist(), teacher.tolist(), strict=True
    ):
        expected = temperature**2 * kl(
            sigmoid(t, temperature), sigmoid(s, temperature)
        )
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_by_hand():
    """From (3/4, 1/4) to (1/2, 1/2): 3/4 log 3/2 + 1/4 log 1/2."""
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    teacher = torch.tensor([math.log(3), 0.0])
    assert softmax_kl(torch.zeros(2), teacher).item() == pytest.approx(
        expected
    )
    assert sigmoid_kl(torch.zeros(1), teacher[:1]).item() == pytest.approx(
        expected
    )


@pytest.mark.parametrize('divergence', [softmax_kl, sigmoid_kl])
def test_equal_logits_are_the_minimum(logits, divergence):
    student, teacher = logits
    assert not divergence(teacher, teacher).any()
    assert divergence(student, teacher).min() >= 0
    student.requires_grad_()
    divergence(student, teacher).sum().backward()
    with torch.no_grad():
        nearer = divergence(student - 0.01 * student.grad, teacher).sum()
    assert nearer < divergence(student, teacher).sum()


@pytest.mark.parametrize('divergence', [softmax_kl, sigmoid_kl])
def test_the_teacher_gets_no_gradient(logits, divergence):
    student, teacher = (z.requires_grad_() for z in logits)
    divergence(student, teacher).sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize('divergence', [softmax_kl, sigmoid_kl])
def test_extreme_logits_stay_finite(divergence):
    student = torch.tensor([[-300.0, 300.0]], dtype=torch.half)
    student.requires_grad_()
    loss = divergence(student, -student.detach(), 0.5).sum()
    loss.backward()
    assert loss.isfinite()
    assert loss > 0
    assert student.grad.isfinite().all()


def test_many_tiny_probabilities_lose_no_digits():
    """The background of a dense head: 1e5 priors of probability 5e-5."""
    teacher = torch.full((100_000,), -10.0)
    exact = 1e5 * kl(sigmoid(-10.0, 1), sigmoid(-9.0, 1))
    assert sigmoid_kl(teacher + 1, teacher).sum().item() == pytest.approx(
        exact, rel=1e-3
    )


@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
@pytest.mark.parametrize('targets', [1, 3])
def test_binary_problems_are_the_mean_of_the_targets(temperature, targets):
    """Values and gradients of the divergences one by one."""
    generator = torch.Generator().manual_seed(0)
    student, *others = 4 * torch.randn(1 + targets, 6, 5, generator=generator)
    weights = torch.rand(6, generator=generator)
    student.requires_grad_()
    apart = [sigmoid_kl(student, z, temperature).sum(-1) for z in others]
    expected = torch.stack(apart).mean(0)
    learner, *known = (
        BinaryProblems(z, temperature) for z in (student, *others)
    )
    result = learner.kl_from(known)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    gradients = [
        torch.autograd.grad((loss * weights).sum(), student)[0]
        for loss in (result, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_binary_problems_by_hand():
    """From 3/4 to 1/2, and from 1/4: the same by symmetry; 0 from itself."""
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    half, more, less = (
        BinaryProblems(torch.tensor([[z]]))
        for z in (0, math.log(3), -math.log(3))
    )
    for targets in ([more], [less], [more, less]):
        assert half.kl_from(targets).item() == pytest.approx(expected)
    assert half.kl_from([half, more]).item() == pytest.approx(
        expected / 2, rel=1e-5
    )
    assert more.kl_from([more]).item() == 0


def test_binary_problems_stay_finite_and_give_targets_no_gradient():
    student = torch.tensor([[-300.0, 300.0]], dtype=torch.half)
    student.requires_grad_()
    target = (-student.detach()).requires_grad_()
    pair = (BinaryProblems(z, 0.5) for z in (student, target))
    learner, other = pair
    loss = learner.kl_from([other]).sum()
    loss.backward()
    assert loss.isfinite()
    assert loss > 0
    assert student.grad.isfinite().all()
    assert target.grad is None


def test_binary_problems_of_a_background_lose_few_digits():
    """1e4 priors with 80 classes of probability 5e-5."""
    target = torch.full((10_000, 80), -10.0)
    exact = 8e5 * kl(sigmoid(-10.0, 1), sigmoid(-9.0, 1))
    learner, known = BinaryProblems(target + 1), BinaryProblems(target)
    assert learner.kl_from([known]).sum().item() == pytest.approx(
        exact, rel=1e-3
    )


@pytest.mark.parametrize(
    ('module', 'divergence'),
    [(SoftmaxKLLoss, softmax_kl), (SigmoidKLLoss, sigmoid_kl)],
)
def test_modules(logits, module, divergence):
    each = divergence(*logits, 2.0)
    loss = module(temperature=2.0, loss_weight=0.5)
    close = torch.testing.assert_close
    close(loss(*logits), 0.5 * each.mean())
    close(loss(*logits, avg_factor=3), 0.5 * each.sum() / 3)


def test_softmax_module_is_mmdetections_but_for_the_mean_over_classes(logits):
    theirs = KnowledgeDistillationKLDivLoss(T=4)(*logits)
    ours = SoftmaxKLLoss(temperature=4.0)(*logits)
    torch.testing.assert_close(ours / logits[0].shape[1], theirs)


@pytest.mark.parametrize('divergence', [softmax_kl, sigmoid_kl])
def test_what_is_refused(divergence):
    name, z = divergence.__name__, torch.zeros(2, 3)
    with pytest.raises(ConfigError, match=rf'{name}\.temperature must be ab'):
        divergence(z, z, 0)
    with pytest.raises(
        ShapeError, match=rf'{name} compares .* \(2, 3\), targ'
    ):
        divergence(z, z[:, :2])


def test_temperatures_that_modules_refuse():
    for module in (SoftmaxKLLoss, SigmoidKLLoss):
        message = rf'{module.__name__}\.temperature must be above 0, got 0'
        with pytest.raises(ConfigError, match=message):
            module(temperature=0)
    with pytest.raises(ConfigError, match=r'BinaryProblems\.temperature must'):
        BinaryProblems(torch.zeros(2), -1.0)
