"""Anticorrelation of feature maps."""

import pytest
import torch

from mmkd.errors import ShapeError
from mmkd.losses import PKDLoss, pkd_loss
from mmkd.losses.pkd import _Anticorrelation
from tests.helpers.feature_maps import random_maps, weights_of
from tests.helpers.loss_references import anticorrelation

SIZES = [(5, 6), (3, 6), (2, 2)]


def cut(maps):
    return [
        m[:, :h, :w].double() for m, (h, w) in zip(maps, SIZES, strict=True)
    ]


def test_by_hand():
    """R of (0, 1, 2) and (0, 2, 1) is a half."""
    student = torch.tensor([0.0, 1.0, 2.0]).view(1, 1, 1, 3)
    teacher = torch.tensor([0.0, 20.0, 10.0]).view(1, 1, 1, 3)
    loss = pkd_loss(student, teacher)
    assert loss.item() == pytest.approx(0.5)
    loss = pkd_loss(-teacher, teacher)
    assert loss.item() == pytest.approx(2.0)


@pytest.mark.parametrize('per_image', [False, True])
def test_the_formula(per_image):
    student, teacher = (random_maps(3, 4, 5, 6, seed=n) for n in (1, 2))
    # Images of other brightness: the two forms differ.
    student = student + torch.tensor([0.0, 3.0, -2.0]).view(3, 1, 1, 1)
    loss = pkd_loss(
        student, teacher, weights_of(SIZES, 5, 6), per_image=per_image
    )
    assert loss.shape == ((3, 4) if per_image else (4,))
    expected = anticorrelation(cut(student), cut(teacher), per_image)
    other = anticorrelation(cut(student), cut(teacher), not per_image)
    assert loss.mean().item() == pytest.approx(expected, rel=1e-5)
    assert abs(expected - other) > 1e-3


def test_the_official_form_is_this_but_for_the_unbiased_deviation():
    """Half the MSE of maps standardised over (B, H, W)."""
    student, teacher = (random_maps(3, 4, 8, 9, seed=n) for n in (1, 2))
    loss = pkd_loss(student, teacher).mean()
    ours, theirs = (
        (m - m.mean((0, 2, 3), keepdim=True)) / m.std((0, 2, 3), keepdim=True)
        for m in (student.double(), teacher.double())
    )
    positions = 3 * 8 * 9
    official = ((ours - theirs) ** 2).mean() / 2
    assert loss.item() == pytest.approx(
        official.item() * positions / (positions - 1), rel=1e-5
    )


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('per_image', [False, True])
def test_the_gradient_by_differences(per_image, padded):
    student, teacher = (
        random_maps(3, 2, 3, 4, seed=n).double() for n in (1, 2)
    )
    sizes = [(3, 4), (2, 3), (1, 2)] if padded else [(3, 4)] * 3
    weights = weights_of(sizes, 3, 4).double()
    if not per_image:
        weights = (weights > 0) / (weights > 0).sum()

    def compute(maps):
        return _Anticorrelation.apply(maps, teacher, weights, per_image)

    assert torch.autograd.gradcheck(compute, student.requires_grad_())


@pytest.mark.parametrize('per_image', [False, True])
def test_channels_in_parts(monkeypatch, per_image):
    student, teacher = (random_maps(3, 4, 5, 6, seed=n) for n in (1, 2))
    weights = weights_of(SIZES, 5, 6)
    student.requires_grad_()
    results = []
    for at_once in (10**6, 180, 1):  # all four channels, two, and one
        monkeypatch.setattr('mmkd.losses.maps.AT_ONCE', at_once)
        loss = pkd_loss(student, teacher, weights, per_image=per_image)
        gradient = torch.autograd.grad(loss.square().sum(), student)[0]
        results.append((loss.detach(), gradient))
    for parts in results[1:]:
        torch.testing.assert_close(parts, results[0])


@pytest.mark.parametrize('autocast', [False, True])
def test_half_precision_is_computed_in_single(autocast):
    maps = [random_maps(2, 2, 9, 9, seed=n).bfloat16() for n in (1, 2)]
    results = []
    for convert in (torch.clone, torch.Tensor.float):
        student, teacher = (convert(m) for m in maps)
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            loss = pkd_loss(student.requires_grad_(), teacher)
        loss.sum().backward()
        results.append((loss.detach(), student.grad.bfloat16()))
        assert loss.dtype == torch.float32
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize('per_image', [False, True])
def test_the_scale_of_a_channel_does_not_matter(per_image):
    teacher = random_maps(3, 4, 5, 6)
    factor = random_maps(1, 4, 1, 1, seed=3).abs() + 0.1
    student = factor * teacher + random_maps(1, 4, 1, 1, seed=4)
    weights = weights_of(SIZES, 5, 6)
    loss = pkd_loss(student, teacher, weights, per_image=per_image)
    assert loss.abs().max() < 1e-5


@pytest.mark.parametrize('per_image', [False, True])
@pytest.mark.parametrize('value', [0, 0.37, 3.3, 123.4, -1e4])
@pytest.mark.parametrize('dead', ['student', 'teacher'])
def test_a_dead_channel_neither_breaks_nor_learns(dead, value, per_image):
    """Its rounding is no pattern; the other channel learns as alone."""
    maps = {
        role: random_maps(2, 2, 50, 67, seed=n)
        for n, role in enumerate(('student', 'teacher'))
    }
    maps[dead][:, 0] = value
    maps['student'].requires_grad_()
    weights = weights_of([(50, 67), (41, 60)], 50, 67)
    loss = pkd_loss(*maps.values(), weights, per_image=per_image).mean()
    loss.backward()
    ours, theirs = (m.detach()[:, 1:] for m in maps.values())
    alone = pkd_loss(ours, theirs, weights, per_image=per_image).mean()
    assert loss.item() == pytest.approx((0.5 + alone.item()) / 2, abs=1e-5)
    gradient = maps['student'].grad.abs().amax((0, 2, 3))
    assert gradient[0] < 1e-5 * gradient[1]


def test_a_faint_pattern_is_one():
    """One thousandth of a channel's mean correlates as the whole does."""
    student, teacher = (random_maps(2, 2, 20, 30, seed=n) for n in (1, 2))
    weights = weights_of([(20, 30)] * 2, 20, 30)
    loss, faint = (
        pkd_loss(s, teacher, weights).mean()
        for s in (student, 100 + 0.1 * student)
    )
    assert faint.item() == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize('per_image', [False, True])
def test_no_weights_are_no_padding(per_image):
    student, teacher = (random_maps(2, 4, 5, 6, seed=n) for n in (1, 2))
    weights = weights_of([(5, 6)] * 2, 5, 6)
    assert torch.equal(
        pkd_loss(student, teacher, per_image=per_image),
        pkd_loss(student, teacher, weights, per_image=per_image),
    )


def test_the_teacher_gets_no_gradient():
    student, teacher = (
        random_maps(2, 4, 5, 6, seed=n).requires_grad_() for n in (1, 2)
    )
    pkd_loss(student, teacher).sum().backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_what_is_refused():
    maps = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ShapeError, match=r'\(B, C, H, W\), got \(2, 3, 4\)'):
        pkd_loss(maps[0], maps[0])
    with pytest.raises(ShapeError, match='Adapt the width and resize'):
        PKDLoss()(maps, maps[:, :1])
