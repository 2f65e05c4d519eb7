"""Channel-wise divergence of feature maps."""

import math

import pytest
import torch

from mmkd.errors import ConfigError, ShapeError
from mmkd.losses import CWDLoss, cwd_loss
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
