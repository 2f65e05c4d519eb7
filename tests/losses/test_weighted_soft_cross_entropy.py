"""Weighted soft cross-entropy against the paper's equation 3."""

import math

import pytest
import torch

from mmkd.errors import ConfigError, ShapeError
from mmkd.losses import (
    WeightedSoftCrossEntropyLoss,
    weighted_soft_cross_entropy_loss,
)


def reference(student, teacher, background_weight=1.5, temperature=1.0):
    """Eq. 3 of Chen et al. for each row, in plain Python floats."""
    losses = []
    for z_s, z_t in zip(student.tolist(), teacher.tolist(), strict=True):
        e_s = [math.exp(z / temperature) for z in z_s]
        e_t = [math.exp(z / temperature) for z in z_t]
        loss = 0.0
        for c in range(len(z_s)):
            w = background_weight if c == len(z_s) - 1 else 1.0
            p_t, p_s = e_t[c] / sum(e_t), e_s[c] / sum(e_s)
            loss -= w * p_t * math.log(p_s)
        losses.append(loss)
    return torch.tensor(losses)


def binary_reference(student, teacher, background_weight=1.5):
    """Each column z as the two-class problem (z, 0), summed over columns."""
    losses = []
    for z_s, z_t in zip(student.tolist(), teacher.tolist(), strict=True):
        loss = 0.0
        for s, t in zip(z_s, z_t, strict=True):
            p_s, p_t = 1 / (1 + math.exp(-s)), 1 / (1 + math.exp(-t))
            loss -= p_t * math.log(p_s)
            loss -= background_weight * (1 - p_t) * math.log(1 - p_s)
        losses.append(loss)
    return torch.tensor(losses)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return (
        2 * torch.randn(7, 5, generator=generator),
        2 * torch.randn(7, 5, generator=generator),
    )


@pytest.mark.parametrize('background_weight', [0.0, 1.0, 1.5, 3.0])
@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
def test_is_the_papers_formula(logits, background_weight, temperature):
    loss = WeightedSoftCrossEntropyLoss(
        background_weight=background_weight,
        temperature=temperature,
        reduction='none',
    )
    expected = reference(*logits, background_weight, temperature)
    torch.testing.assert_close(loss(*logits), expected)


def test_hand_worked_value():
    # p_s = (3/4, 1/4), p_t = (1/2, 1/2), w = (1, 1.5):
    # -(0.5 * ln 0.75 + 1.5 * 0.5 * ln 0.25) = 0.14384 + 1.03972
    student = torch.tensor([[math.log(3.0), 0.0]])
    loss = WeightedSoftCrossEntropyLoss()(student, torch.zeros(1, 2))
    assert loss.item() == pytest.approx(1.183561, abs=1e-6)


def test_defaults_are_the_papers():
    loss = WeightedSoftCrossEntropyLoss()
    assert (loss.background_weight, loss.temperature) == (1.5, 1.0)


def test_weight_stands_inside_the_sum_not_on_the_sample():
    # A sample that the teacher is sure is an object is not weighted at all.
    student = torch.tensor([[1.0, 0.0, -1.0]])
    teacher = torch.tensor([[200.0, 0.0, 0.0]])
    plain = WeightedSoftCrossEntropyLoss(background_weight=1.0)
    heavy = WeightedSoftCrossEntropyLoss(background_weight=9.0)
    assert heavy(student, teacher) == plain(student, teacher)


def test_equals_torch_cross_entropy_without_background_weight(logits):
    student, teacher = logits
    loss = WeightedSoftCrossEntropyLoss(background_weight=1.0)
    expected = torch.nn.functional.cross_entropy(student, teacher.softmax(1))
    torch.testing.assert_close(loss(student, teacher), expected)


def test_sigmoid_columns_are_two_class_problems(logits):
    loss = WeightedSoftCrossEntropyLoss(use_sigmoid=True, reduction='none')
    torch.testing.assert_close(loss(*logits), binary_reference(*logits))


@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_sigmoid_is_the_softmax_of_z_and_0(logits, temperature):
    student, teacher = (z[:, :1] for z in logits)
    options = dict(temperature=temperature, reduction='none')
    sigmoid = WeightedSoftCrossEntropyLoss(use_sigmoid=True, **options)
    softmax = WeightedSoftCrossEntropyLoss(**options)
    with_zero = [
        torch.cat([z, torch.zeros_like(z)], 1) for z in (student, teacher)
    ]
    torch.testing.assert_close(sigmoid(student, teacher), softmax(*with_zero))


@pytest.mark.parametrize('use_sigmoid', [False, True])
def test_student_equal_to_teacher_is_the_minimum(logits, use_sigmoid):
    # Of the unweighted formula; with a background weight the minimum lies
    # where w*p_t, normalised, is met.
    _, teacher = logits
    loss = WeightedSoftCrossEntropyLoss(
        background_weight=1.0, use_sigmoid=use_sigmoid
    )
    student = teacher.clone().requires_grad_()
    least = loss(student, teacher)
    least.backward()
    torch.testing.assert_close(
        student.grad, torch.zeros_like(student), atol=1e-7, rtol=0
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        step = 0.1 * torch.randn(teacher.shape, generator=generator)
        assert loss(teacher + step, teacher) > least


def test_weighted_minimum_is_the_reweighted_teacher():
    p_t = torch.tensor([[0.2, 0.3, 0.5]])
    weighted = p_t * torch.tensor([1.0, 1.0, 1.5])
    student = (weighted / weighted.sum()).log().requires_grad_()
    WeightedSoftCrossEntropyLoss()(student, p_t.log()).backward()
    torch.testing.assert_close(
        student.grad, torch.zeros(1, 3), atol=1e-7, rtol=0
    )


def test_gradient_reaches_the_student_and_never_the_teacher(logits):
    student, teacher = (z.clone().requires_grad_() for z in logits)
    WeightedSoftCrossEntropyLoss()(student, teacher).backward()
    assert teacher.grad is None
    assert (student.grad != 0).all()


def test_weight_average_and_reductions(logits):
    rows = reference(*logits)
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5, 0.0, 1.0, 3.0])
    loss = WeightedSoftCrossEntropyLoss()
    close = torch.testing.assert_close
    close(loss(*logits), rows.mean())
    close(loss(*logits, weight), (rows * weight).mean())
    close(loss(*logits, weight, avg_factor=5), (rows * weight).sum() / 5)
    close(loss(*logits, reduction_override='sum'), rows.sum())
    close(
        loss(*logits, weight, reduction_override='none'),
        rows * weight,
    )
    doubled = WeightedSoftCrossEntropyLoss(loss_weight=2.0, reduction='sum')
    close(doubled(*logits), 2 * rows.sum())


def test_avg_factor_with_sum_is_refused_like_in_mmdet(logits):
    loss = WeightedSoftCrossEntropyLoss(reduction='sum')
    with pytest.raises(ConfigError, match='avg_factor can not be used'):
        loss(*logits, avg_factor=3)


@pytest.mark.parametrize('use_sigmoid', [False, True])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_safe(dtype, use_sigmoid):
    # The difference of two such logits overflows in float16.
    student = torch.tensor([[6e4, -6e4, 0.0]], dtype=dtype).requires_grad_()
    teacher = torch.tensor([[-6e4, 6e4, 0.0]], dtype=dtype)
    loss = WeightedSoftCrossEntropyLoss(use_sigmoid=use_sigmoid)
    value = loss(student, teacher)
    value.backward()
    exact = loss(student.detach().double(), teacher.double())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, exact.float())
    assert student.grad.isfinite().all()


def test_logits_of_any_number_of_axes(logits):
    student, teacher = logits
    loss = WeightedSoftCrossEntropyLoss(reduction='none')
    expected = loss(student, teacher)
    shaped = loss(student.view(7, 1, 5), teacher.view(7, 1, 5))
    torch.testing.assert_close(shaped, expected.view(7, 1))


def test_no_samples_give_0_with_a_gradient():
    student = torch.zeros(0, 4, requires_grad=True)
    for avg_factor in (None, 1):
        loss = WeightedSoftCrossEntropyLoss()(
            student, torch.zeros(0, 4), avg_factor=avg_factor
        )
        assert loss.item() == 0
        loss.backward()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(temperature=0), 'temperature must be above 0, got 0'),
        (dict(background_weight=-1), 'background_weight must be at least 0'),
    ],
)
def test_options_outside_their_range(options, message):
    with pytest.raises(ConfigError, match=message):
        WeightedSoftCrossEntropyLoss(**options)
    with pytest.raises(ConfigError, match=message):
        weighted_soft_cross_entropy_loss(*[torch.zeros(1, 2)] * 2, **options)


def test_unequal_shapes_say_what_to_do():
    loss = WeightedSoftCrossEntropyLoss()
    message = r'pred \(2, 4\), target \(2, 5\)\. Select the classes'
    with pytest.raises(ShapeError, match=message):
        loss(torch.zeros(2, 4), torch.zeros(2, 5))
