"""Decoupled knowledge distillation of logits."""

import math

import pytest
import torch

from mmkd.errors import ConfigError, ShapeError
from mmkd.losses import DKDLoss, dkd_parts
from tests.helpers.loss_references import decoupled, kl, softmax


@pytest.mark.parametrize('sigmoid', [False, True])
@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_the_two_parts(sigmoid, temperature):
    generator = torch.Generator().manual_seed(0)
    z, z_t = (5 * torch.randn(6, 4, generator=generator) for _ in range(2))
    labels = [0, 1, 2, 3, 0, 2]
    parts = dkd_parts(
        z,
        z_t,
        torch.tensor(labels),
        temperature=temperature,
        use_sigmoid=sigmoid,
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
    target, others = dkd_parts(z, z_t, torch.tensor(labels), temperature=2.0)
    for row, y in enumerate(labels):
        p, p_t = (softmax(x[row].tolist(), 2.0) for x in (z, z_t))
        combined = target[row] + (1 - p_t[y]) * others[row]
        assert combined.item() == pytest.approx(4 * kl(p_t, p), rel=1e-4)


def test_by_hand():
    """Target 3/4 against 1/2; the others 1/2, 1/2 in both."""
    z = torch.tensor([[math.log(2.0), 0.0, 0.0]])
    z_t = torch.tensor([[math.log(6.0), 0.0, 0.0]])
    target, others = dkd_parts(z, z_t, torch.tensor([0]), temperature=1.0)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert target.item() == pytest.approx(expected)
    assert others.item() == pytest.approx(0, abs=1e-7)


def test_the_targets_logit_does_not_enter_the_other_part():
    z = torch.tensor([[3.0, 1.0, 0.0]], requires_grad=True)
    z_t = torch.tensor([[0.0, 0.0, 1.0]])
    _, others = dkd_parts(z, z_t, torch.tensor([0]))
    others.sum().backward()
    assert z.grad[0, 0] == 0
    assert z.grad[0, 1] > 0 > z.grad[0, 2]


def test_half_precision():
    """Masked logits stay within the range of the computation."""
    z, z_t = (torch.randn(4, 5).half() for _ in range(2))
    target, others = dkd_parts(z, z_t, torch.arange(4))
    assert target.isfinite().all()
    assert others.isfinite().all()
    assert target.dtype == torch.float32


def test_the_teacher_gets_no_gradient():
    z, z_t = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    DKDLoss()(z, z_t, torch.arange(4)).backward()
    assert z.grad.abs().sum() > 0
    assert z_t.grad is None


def test_the_module_adds_both():
    z, z_t = (torch.randn(4, 5) for _ in range(2))
    label = torch.arange(4)
    target, others = dkd_parts(z, z_t, label, temperature=2.0)
    loss = DKDLoss(alpha=2.0, beta=3.0, temperature=2.0, loss_weight=0.5)
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0])
    each = 0.5 * weight * (2 * target + 3 * others)
    close = torch.testing.assert_close
    close(loss(z, z_t, label, weight, reduction_override='none'), each)
    close(loss(z, z_t, label, weight, avg_factor=3), each.sum() / 3)


def test_what_is_refused():
    z, label = torch.zeros(2, 4), torch.zeros(2).long()
    with pytest.raises(ConfigError, match=r'temperature must be above 0, g'):
        dkd_parts(z, z, label, temperature=0)
    with pytest.raises(ConfigError, match=r'DKDLoss\.alpha must be at least'):
        DKDLoss(alpha=-1)
    with pytest.raises(ShapeError, match=r'of at least 3 .* got \(2, 2\)'):
        dkd_parts(z[:, :2], z[:, :2], label)
    with pytest.raises(ShapeError, match=r'a label for each .* and \(1,\)'):
        dkd_parts(z, z, label[:1])
    with pytest.raises(ShapeError, match='Select the classes that both'):
        dkd_parts(z, z[:, :3], label)
