"""The cosine distance of two features."""

import math

import pytest
import torch

from mmkd.errors import ShapeError
from mmkd.losses import CosineLoss, cosine_loss
from tests.helpers.feature_maps import random_maps


def reference(ours, theirs):
    """One minus the cosine of two lists of numbers."""
    product = sum(a * b for a, b in zip(ours, theirs, strict=True))
    lengths = [math.sqrt(sum(a * a for a in v)) for v in (ours, theirs)]
    return 1 - product / (lengths[0] * lengths[1])


def test_by_hand():
    student = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    # cosines 3/5, 0 and -1
    expected = torch.tensor([0.4, 1.0, 2.0])
    torch.testing.assert_close(cosine_loss(student, teacher), expected)


def test_every_position_of_maps():
    ours, theirs = (random_maps(2, 5, 3, 4, seed=seed) for seed in (0, 1))
    found = cosine_loss(ours, theirs)
    assert found.shape == (2, 3, 4)
    for image in range(2):
        for row in range(3):
            for column in range(4):
                vectors = (
                    maps[image, :, row, column].double().tolist()
                    for maps in (ours, theirs)
                )
                expected = reference(*vectors)
                value = found[image, row, column].item()
                assert value == pytest.approx(expected, abs=1e-6)


def test_lengths_do_not_matter():
    ours, theirs = (random_maps(2, 5, 3, 4, seed=seed) for seed in (0, 1))
    torch.testing.assert_close(
        cosine_loss(100 * ours, 0.01 * theirs), cosine_loss(ours, theirs)
    )
    assert cosine_loss(ours, 3 * ours).abs().max() < 1e-6


def test_zeros_are_far_from_everything_and_have_finite_gradients():
    ours = torch.zeros(1, 3, requires_grad=True)
    loss = cosine_loss(ours, torch.ones(1, 3))
    loss.sum().backward()
    assert loss.item() == 1
    assert ours.grad.isfinite().all()


def test_gradients_of_the_student_alone():
    ours = random_maps(3, 4, seed=0).requires_grad_()
    theirs = random_maps(3, 4, seed=1).requires_grad_()
    cosine_loss(ours, theirs).sum().backward()
    assert theirs.grad is None
    # A longer vector is as far: the gradient is perpendicular to it.
    assert (ours.grad * ours).sum(1).abs().max() < 1e-6
    numeric = torch.zeros_like(ours)
    for place in range(ours.numel()):
        moved = ours.detach().double().flatten()
        values = []
        for step in (1e-4, -1e-4):
            moved[place] += step
            vectors = moved.view(3, 4).tolist(), theirs.double().tolist()
            values.append(sum(map(reference, *vectors)))
            moved[place] -= step
        numeric.view(-1)[place] = (values[0] - values[1]) / 2e-4
    torch.testing.assert_close(ours.grad, numeric, atol=1e-4, rtol=1e-3)


def test_the_module_weights_positions():
    ours, theirs = (random_maps(2, 5, 3, 4, seed=seed) for seed in (0, 1))
    weight = torch.zeros(2, 3, 4)
    weight[0, 1, 2], weight[1, 0, 0] = 2.0, 4.0
    found = CosineLoss(loss_weight=3.0)(ours, theirs, weight, avg_factor=2.0)
    each = cosine_loss(ours, theirs)
    expected = 3 * (2 * each[0, 1, 2] + 4 * each[1, 0, 0]) / 2
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(CosineLoss()(ours, theirs), each.mean())


def test_half_precision_is_compared_in_single():
    ours = random_maps(2, 5, seed=0).half()
    found = cosine_loss(ours, random_maps(2, 5, seed=1).half())
    assert found.dtype == torch.float32


def test_other_shapes():
    with pytest.raises(ShapeError, match=r'pred \(1, 2\), target \(1, 3\)'):
        cosine_loss(torch.ones(1, 2), torch.ones(1, 3))
