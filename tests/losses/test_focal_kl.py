"""Divergence from soft labels that focuses on where the networks differ."""

import pytest
import torch

from mmkd.errors import ConfigError, ShapeError
from mmkd.losses import FocalKLLoss, focal_kl_loss
from tests.helpers.loss_references import focal_kl


def test_values():
    ours = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    theirs = torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64)
    loss = FocalKLLoss(gamma=0.5, reduction='none')(ours, theirs)
    expected = [
        focal_kl(t, s, 0.5)
        for t, s in zip(theirs.tolist(), ours.tolist(), strict=True)
    ]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)


def test_gamma_0_is_the_plain_divergence():
    loss = FocalKLLoss(gamma=0.0)(torch.zeros(1), torch.ones(1))
    assert loss.item() == pytest.approx(focal_kl(1, 0, 0), rel=1e-6)


def test_equal_is_zero_without_gradient():
    z = torch.linspace(-9, 9, 7, requires_grad=True)
    loss = FocalKLLoss(reduction='sum')(z, z.detach().clone())
    loss.backward()
    assert loss.abs().item() < 1e-7
    assert z.grad.abs().max() < 1e-6


def test_extreme_half_precision():
    z = torch.tensor([-60.0, 60.0, 40.0]).half().requires_grad_()
    target = torch.tensor([60.0, -60.0, 40.0]).half()
    loss = FocalKLLoss(reduction='sum')(z, target)
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()


def test_the_gradient_flows_through_the_factor():
    z = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor(2.0, dtype=torch.float64)
    FocalKLLoss()(z, target).backward()
    step = 1e-4
    slope = (
        focal_kl(2.0, 0.3 + step, 0.5) - focal_kl(2.0, 0.3 - step, 0.5)
    ) / (2 * step)
    assert z.grad.item() == pytest.approx(slope, rel=1e-4)


def test_bad_options():
    with pytest.raises(ConfigError, match=r'FocalKLLoss\.gamma must be at'):
        FocalKLLoss(gamma=-1)
    with pytest.raises(ConfigError, match=r'focal_kl_loss\.gamma must be at'):
        focal_kl_loss(torch.zeros(1), torch.zeros(1), gamma=-1)


def test_unequal_shapes():
    with pytest.raises(ShapeError, match=r'pred \(2,\), target \(3,\)'):
        focal_kl_loss(torch.zeros(2), torch.zeros(3))


def test_the_teacher_gets_no_gradient():
    z, target = (torch.randn(5, requires_grad=True) for _ in range(2))
    FocalKLLoss()(z, target).backward()
    assert z.grad.abs().sum() > 0
    assert target.grad is None
