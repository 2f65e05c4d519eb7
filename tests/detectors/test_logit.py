"""Logits of probabilities, beside losses of the probabilities themselves."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmkd.detectors.logit import logit


@pytest.mark.parametrize(
    ('p', 'expected'),
    [
        (0.5, 0.0),
        (0.75, math.log(3)),
        (1e-6, math.log(1e-6)),
        (1e-9, math.log(1e-9)),
        (1e-30, math.log(1e-30)),
        (0.0, -100.0),
        (1.0, math.log(2**24)),
    ],
)
def test_values(p, expected):
    found = logit(torch.tensor(p)).item()
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def gradient(loss, z):
    z = z.clone().requires_grad_()
    loss(z.sigmoid()).sum().backward()
    return z.grad


@pytest.mark.parametrize('target', [0.0, 0.3, 1.0])
def test_the_gradient_is_that_of_probabilities(target):
    """Of their cross-entropy, also far beyond where PyTorch's fades."""
    z = torch.linspace(-90, 90, 361)
    aim = torch.full_like(z, target)
    ours = gradient(
        lambda p: F.binary_cross_entropy_with_logits(
            logit(p), aim, reduction='none'
        ),
        z,
    )
    theirs = gradient(
        lambda p: F.binary_cross_entropy(p, aim, reduction='none'), z
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    learning = (z >= -27) & (z <= 16)  # to p = 1e-12, and until p rounds to 1
    exact = z.sigmoid() - target
    torch.testing.assert_close(
        ours[learning], exact[learning], rtol=1e-4, atol=1e-6
    )


def test_extremes_are_finite_in_mixed_precision():
    """A loss scale of 2^16 times the steepest gradient does not overflow."""
    z = torch.tensor([-200.0, -100.0, -60.0, -27.0, 0.0, 17.0, 100.0])
    for target in (0.0, 1.0):
        aim = torch.full_like(z, target)
        found = gradient(
            lambda p, aim=aim: (
                2**16
                * F.binary_cross_entropy_with_logits(
                    logit(p), aim, reduction='none'
                )
            ),
            z,
        )
        assert found.isfinite().all()


def test_half_precision_becomes_float32():
    assert logit(torch.tensor([0.5], dtype=torch.half)).dtype == torch.float32
