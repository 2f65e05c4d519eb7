"""Quality focal loss towards soft targets."""

import math

import pytest
import torch
from mmdet.models.losses import QualityFocalLoss

from mmkd.errors import ConfigError, ShapeError
from mmkd.losses import SoftFocalLoss, soft_focal_loss


def reference(z, p, beta):
    """The loss of one logit and one probability, in plain floats."""
    sigma = 1 / (1 + math.exp(-z))
    entropy = -p * math.log(sigma) - (1 - p) * math.log(1 - sigma)
    return abs(sigma - p) ** beta * entropy


def test_by_hand():
    """Logit 0 against 3/4: |1/2 - 3/4| log 2."""
    z = torch.zeros(1)
    loss = soft_focal_loss(z, torch.tensor([0.75]))
    assert loss.item() == pytest.approx(0.25 * math.log(2))
    assert soft_focal_loss(z, torch.tensor([0.5])).item() == 0
    loss = soft_focal_loss(z, torch.tensor([0.75]), beta=0.0)
    assert loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize('beta', [0.0, 0.5, 1.0, 2.0])
def test_the_formula(beta):
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(30, generator=generator)
    p = torch.rand(30, generator=generator)
    expected = [
        reference(a, b, beta)
        for a, b in zip(z.tolist(), p.tolist(), strict=True)
    ]
    loss = soft_focal_loss(z, p, beta=beta)
    assert loss.tolist() == pytest.approx(expected, rel=1e-4)


def test_it_is_mmdetections_where_that_is_defined():
    """Its target is one class with a quality, and 0 for all others."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, 4, generator=generator)
    label = torch.tensor([0, 1, 2, 3, 4, 4])  # 4: the background
    quality = torch.rand(6, generator=generator)
    target = torch.zeros(6, 5).scatter(1, label[:, None], quality[:, None])
    torch.testing.assert_close(
        SoftFocalLoss(beta=2.0)(z, target[:, :4], avg_factor=4),
        QualityFocalLoss(beta=2.0)(z, (label, quality), avg_factor=4),
    )


@pytest.mark.parametrize('beta', [0.0, 0.5, 1.0, 2.0])
def test_the_gradient_is_finite_where_the_target_is_met(beta):
    z = torch.zeros(2, requires_grad=True)
    soft_focal_loss(z, torch.tensor([0.5, 0.75]), beta=beta).sum().backward()
    assert z.grad[0] == 0
    assert -1 < z.grad[1] < 0


def test_the_teacher_gets_no_gradient():
    z, p = (torch.rand(5, requires_grad=True) for _ in range(2))
    SoftFocalLoss()(z, p).backward()
    assert z.grad.abs().sum() > 0
    assert p.grad is None


def test_half_precision():
    z = torch.tensor([60.0, -60.0]).half().requires_grad_()
    loss = soft_focal_loss(z, torch.tensor([0.0, 1.0]).half()).sum()
    loss.backward()
    assert (loss.dtype, loss.item()) == (torch.float32, 120.0)
    assert z.grad.tolist() == [1.0, -1.0]


def test_what_is_refused():
    z = torch.zeros(2, 3)
    with pytest.raises(ConfigError, match=r'soft_focal_loss\.beta must be at'):
        soft_focal_loss(z, z, beta=-1)
    with pytest.raises(ConfigError, match=r'SoftFocalLoss\.beta must be at l'):
        SoftFocalLoss(beta=-1)
    with pytest.raises(ShapeError, match=r'pred \(2, 3\), target \(2, 2\)'):
        soft_focal_loss(z, z[:, :2])
