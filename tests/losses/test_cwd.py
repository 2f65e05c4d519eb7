"""Channel-wise divergence of feature maps."""

import math

import pytest
import torch

from mmkd.errors import ConfigError, ShapeError
from mmkd.losses import CWDLoss, cwd_loss
from mmkd.losses.cwd import _ChannelKL
from mmkd.losses.maps import OUTSIDE
from tests.helpers.feature_maps import FeaturePair, random_maps, weights_of
from tests.helpers.loss_references import channel_kl


def test_by_hand():
    """Odds of 1:1 in the student against 3:1 in the teacher."""
    student = torch.zeros(1, 1, 1, 2)
    teacher = torch.tensor([[[[math.log(3.0), 0.0]]]])
    loss = cwd_loss(student, teacher)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
def test_the_formula(temperature):
    student, teacher = (random_maps(3, 4, 5, 6, seed=n) for n in (1, 2))
    sizes = [(5, 6), (3, 6), (2, 1)]
    loss = cwd_loss(
        student,
        teacher,
        weights_of(sizes, 5, 6),
        temperature=temperature,
    ).mean()
    each = [
        channel_kl(s[:, :h, :w], t[:, :h, :w], temperature)
        for s, t, (h, w) in zip(student, teacher, sizes, strict=True)
    ]
    assert loss.item() == pytest.approx(sum(each) / 3, rel=1e-5)


def test_a_shift_of_a_channel_is_no_difference():
    teacher = random_maps(2, 4, 5, 6)
    student = teacher + random_maps(2, 4, 1, 1, seed=3)
    weights = weights_of([(5, 6), (4, 4)], 5, 6)
    assert cwd_loss(student, teacher, weights).abs().max() < 1e-6
    assert cwd_loss(2 * student, teacher, weights).min() > 1e-2


def test_the_gradient_is_that_of_the_formula():
    student, teacher = (random_maps(1, 2, 2, 3, seed=n) for n in (1, 2))
    student.requires_grad_()
    weights = weights_of([(2, 2)], 2, 3)
    cwd_loss(student, teacher, weights, temperature=2.0).mean().backward()
    p, q = (
        (m[..., :2] / 2).flatten(2).softmax(-1).view(1, 2, 2, 2)
        for m in (student.detach(), teacher)
    )
    expected = torch.zeros_like(student)
    expected[..., :2] = 2**2 * (p - q) / 2 / 2  # T^2 / T / C
    assert torch.allclose(student.grad, expected, atol=1e-6)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 3.0])
@pytest.mark.parametrize('padded', [False, True])
def test_the_gradient_by_differences(temperature, padded):
    student, teacher = (
        random_maps(2, 3, 3, 4, seed=n).double() for n in (1, 2)
    )
    student.requires_grad_()
    limit = None
    if padded:
        inside = weights_of([(3, 4), (2, 3)], 3, 4) > 0
        limit = torch.where(inside, torch.inf, OUTSIDE).double().flatten(2)

    def compute(maps):
        return _ChannelKL.apply(maps, teacher, limit, temperature)

    assert torch.autograd.gradcheck(compute, student)


@pytest.mark.parametrize('numbers', [1, 60, 240])
def test_channels_in_parts(monkeypatch, numbers):
    """One, one and two channels of two images at once are as all four."""
    student, teacher = (random_maps(2, 4, 5, 6, seed=n) for n in (1, 2))
    weights = weights_of([(5, 6), (4, 4)], 5, 6)
    student.requires_grad_()
    results = []
    for at_once in (10**6, numbers):
        monkeypatch.setattr('mmkd.losses.maps.AT_ONCE', at_once)
        loss = cwd_loss(student, teacher, weights, temperature=2.0)
        gradient = torch.autograd.grad(loss.square().sum(), student)[0]
        results.append((loss.detach(), gradient))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole)


def test_maps_without_images_or_channels():
    for shape in ((0, 2, 3, 4), (2, 0, 3, 4)):
        maps = torch.zeros(shape, requires_grad=True)
        loss = cwd_loss(maps, maps.detach())
        assert loss.shape == shape[:2]
        loss.sum().backward()
        assert maps.grad.shape == shape


def test_channels_last():
    student, teacher = (random_maps(2, 4, 5, 6, seed=n) for n in (1, 2))
    last = student.to(memory_format=torch.channels_last).requires_grad_()
    student.requires_grad_()
    losses = [cwd_loss(maps, teacher) for maps in (student, last)]
    torch.testing.assert_close(*losses)
    sum(loss.sum() for loss in losses).backward()
    torch.testing.assert_close(student.grad, last.grad)


def test_the_gradient_can_be_asked_for_again():
    """What is kept for it does not change by being used."""
    student, teacher = (random_maps(1, 2, 2, 3, seed=n) for n in (1, 2))
    student.requires_grad_()
    loss = cwd_loss(student, teacher)
    weight = torch.tensor([[1.0, 2.0]])
    first, second = (
        torch.autograd.grad(loss, student, weight, retain_graph=True)[0]
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_the_teacher_gets_no_gradient():
    student, teacher = (
        random_maps(1, 2, 2, 3, seed=n).requires_grad_() for n in (1, 2)
    )
    cwd_loss(student, teacher).sum().backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('autocast', [False, True])
def test_half_precision_is_computed_in_single(dtype, autocast):
    maps = [40 * random_maps(1, 2, 20, 30, seed=n).to(dtype) for n in (1, 2)]
    losses, gradients = [], []
    for convert in (torch.clone, torch.Tensor.float):
        student, teacher = (convert(m) for m in maps)
        student.requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            loss = cwd_loss(student, teacher, temperature=2.0)
        assert loss.dtype == torch.float32
        loss.sum().backward()
        losses.append(loss.detach())
        gradients.append(student.grad)
    assert torch.equal(*losses)
    assert gradients[0].dtype == dtype
    assert torch.equal(gradients[0], gradients[1].to(dtype))


@pytest.mark.parametrize('padded', [False, True])
def test_one_map_is_kept_for_the_gradient(padded):
    student, teacher = (random_maps(2, 4, 5, 6, seed=n) for n in (1, 2))
    weights = weights_of([(5, 6), (4, 4)], 5, 6) if padded else None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t
    ):
        cwd_loss(student.requires_grad_(), teacher, weights)
    assert kept == [student.numel()]


def test_each_channel_of_each_image_has_its_loss():
    student, teacher = (random_maps(3, 4, 5, 6, seed=n) for n in (1, 2))
    loss = cwd_loss(student, teacher, temperature=2.0)
    assert loss.shape == (3, 4)
    for image in range(3):
        for c in range(4):
            expected = channel_kl(
                student[image, c : c + 1], teacher[image, c : c + 1], 2.0
            )
            assert loss[image, c].item() == pytest.approx(expected, rel=1e-4)


def test_no_weights_are_no_padding():
    student, teacher = (random_maps(2, 4, 5, 6, seed=n) for n in (1, 2))
    weights = weights_of([(5, 6)] * 2, 5, 6)
    assert torch.equal(
        cwd_loss(student, teacher), cwd_loss(student, teacher, weights)
    )


def test_shares_that_are_too_small_to_matter():
    """A teacher without doubt, a student with the opposite opinion."""
    student = torch.tensor([0.0, 500.0, 250.0]).view(1, 1, 1, 3)
    teacher = torch.tensor([500.0, 0.0, 0.0]).view(1, 1, 1, 3)
    student.requires_grad_()
    loss = cwd_loss(student, teacher)
    assert loss.item() == pytest.approx(500.0)
    loss.sum().backward()
    assert student.grad.flatten().tolist() == pytest.approx([-1, 1, 0])


def test_what_is_refused():
    maps = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ConfigError, match=r'temperature must be above 0, g'):
        cwd_loss(maps, maps, temperature=0.0)
    with pytest.raises(ConfigError, match=r'CWDLoss\.temperature must be ab'):
        CWDLoss(temperature=math.nan)
    with pytest.raises(ShapeError, match=r'\(B, C, H, W\), got \(2, 3, 4\)'):
        cwd_loss(maps[0], maps[0])
    with pytest.raises(ShapeError, match=r'pred \(1, 2, 3, 4\), target \(1, '):
        cwd_loss(maps, maps[:, :1])


@pytest.mark.parametrize('name', ['CWD', 'PKD'])
def test_the_module_makes_feature_hint_the_method(name, recwarn):
    """On images with padding; both average over images and channels."""
    options = dict(per_image=True) if name == 'PKD' else {}
    loss = dict(type=f'mmkd.{name}Loss', **options)
    method = FeaturePair(name, levels=[1], loss_weight=1.0, **options)
    hint = FeaturePair('FeatureHint', levels=[1], adapt=None, loss=loss)
    sizes = ((96, 128), (64, 96))
    (expected,) = method.step(sizes=sizes).values()
    assert expected > 0
    torch.testing.assert_close(hint.step(sizes=sizes)['hint'], expected)
