"""Teacher-bounded regression against the paper's equation 4."""

import pytest
import torch

from mmkd.errors import ConfigError, ShapeError
from mmkd.losses import (
    TeacherBoundedRegressionLoss,
    teacher_bounded_regression_loss,
)


def reference(student, target, teacher, margin=0.0):
    """Eq. 4 of Chen et al. for each box, in plain Python floats."""
    losses = []
    for s, y, t in zip(
        student.tolist(), target.tolist(), teacher.tolist(), strict=True
    ):
        error_s = sum((a - b) ** 2 for a, b in zip(s, y, strict=True))
        error_t = sum((a - b) ** 2 for a, b in zip(t, y, strict=True))
        losses.append(error_s if error_s + margin > error_t else 0.0)
    return torch.tensor(losses)


@pytest.fixture
def deltas():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(40, 4, generator=generator) for _ in range(3)]


@pytest.mark.parametrize('margin', [0.0, 0.5, 5.0])
def test_is_the_papers_formula(deltas, margin):
    loss = TeacherBoundedRegressionLoss(
        margin=margin, loss_weight=1.0, reduction='none'
    )
    expected = reference(*deltas, margin)
    closed = (expected == 0).sum()
    assert 0 < closed < 40  # the batch holds both sides of the gate
    torch.testing.assert_close(loss(*deltas), expected)


def test_gate_is_decided_per_box_not_per_delta():
    # Better than the teacher in one coordinate, worse over all four.
    target = torch.zeros(1, 4)
    student = torch.tensor([[0.0, 3.0, 0.0, 0.0]])
    teacher = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    loss = TeacherBoundedRegressionLoss(loss_weight=1.0)
    assert loss(student, target, teacher).item() == 9.0
    student = torch.tensor([[0.0, 1.5, 0.0, 0.0]])
    assert loss(student, target, teacher).item() == 0.0


def test_margin_keeps_a_slightly_better_student_learning():
    target, teacher = torch.zeros(1, 4), torch.full((1, 4), 0.5)  # error 1
    student = torch.tensor([[0.8, 0.0, 0.0, 0.0]])  # error 0.64
    values = [
        TeacherBoundedRegressionLoss(margin=m, loss_weight=1.0)(
            student, target, teacher
        ).item()
        for m in (0.0, 0.35, 0.37)
    ]
    assert values == pytest.approx([0.0, 0.0, 0.64])


def test_equal_errors_close_the_gate(deltas):
    student, target, _ = deltas
    loss = TeacherBoundedRegressionLoss()
    assert loss(student, target, student.clone()).item() == 0
    # As far from the target on the other side: the gate is strict.
    assert loss(student, torch.zeros(40, 4), -student).item() == 0
    with_margin = TeacherBoundedRegressionLoss(margin=1e-3, loss_weight=1.0)
    expected = (student - target).square().sum() / 40
    torch.testing.assert_close(
        with_margin(student, target, student.clone()), expected
    )


def test_nu_is_the_loss_weight_and_half_by_default(deltas):
    assert TeacherBoundedRegressionLoss().loss_weight == 0.5
    torch.testing.assert_close(
        TeacherBoundedRegressionLoss()(*deltas),
        0.5 * reference(*deltas).mean(),
    )


def test_gradient_pulls_to_the_target_and_never_reaches_the_teacher(deltas):
    student, target, teacher = (d.clone().requires_grad_() for d in deltas)
    loss = TeacherBoundedRegressionLoss(loss_weight=1.0, reduction='sum')
    loss(student, target.detach(), teacher).backward()
    assert teacher.grad is None
    opened = reference(*deltas) > 0
    expected = 2 * (deltas[0] - deltas[1])
    expected[~opened] = 0
    torch.testing.assert_close(student.grad, expected)


def test_a_step_along_the_gradient_ignores_a_wrong_teacher():
    target = torch.zeros(1, 4)
    student = torch.full((1, 4), 1.0, requires_grad=True)
    # Closer to the target than the student, but beyond it.
    teacher = torch.full((1, 4), -0.9)
    TeacherBoundedRegressionLoss(loss_weight=1.0)(
        student, target, teacher
    ).backward()
    torch.testing.assert_close(student.grad, torch.full((1, 4), 2.0))


def test_weights_do_not_move_the_gate():
    target, teacher = torch.zeros(2, 4), torch.full((2, 4), 0.9)
    student = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.1, 0.1, 0.1, 0.1]])
    weight = torch.tensor([[1.0, 0.0, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0]])
    loss = TeacherBoundedRegressionLoss(loss_weight=1.0, reduction='none')
    # Weighted, the first box' error is 1.5 < 3.24: the gate stays open.
    result = loss(student, target, teacher, weight)
    assert result.tolist() == [1.5, 0.0]


def test_weight_average_and_reductions(deltas):
    boxes = reference(*deltas)
    weight = torch.linspace(0, 2, 40)
    loss = TeacherBoundedRegressionLoss(loss_weight=1.0)
    close = torch.testing.assert_close
    close(loss(*deltas), boxes.mean())
    close(loss(*deltas, weight), (boxes * weight).mean())
    close(loss(*deltas, weight, avg_factor=16), (boxes * weight).sum() / 16)
    close(
        loss(*deltas, weight[:, None].expand(-1, 4), avg_factor=16),
        (boxes * weight).sum() / 16,
    )
    close(loss(*deltas, reduction_override='sum'), boxes.sum())
    close(loss(*deltas, reduction_override='none'), boxes)


def test_an_infinite_teacher_closes_the_gate_without_nan():
    student = torch.ones(2, 4, requires_grad=True)
    teacher = torch.full((2, 4), torch.inf)
    loss = TeacherBoundedRegressionLoss()(student, torch.zeros(2, 4), teacher)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_safe(dtype):
    # 300 squared exceeds float16.
    student = torch.full((1, 4), 300.0, dtype=dtype, requires_grad=True)
    zeros = torch.zeros(1, 4, dtype=dtype)
    loss = TeacherBoundedRegressionLoss(loss_weight=1.0)(student, zeros, zeros)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == 4 * 300.0**2
    assert student.grad.tolist() == [[600.0] * 4]


def test_no_boxes_give_0_with_a_gradient():
    student, empty = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 4)
    for avg_factor in (None, 1):
        loss = TeacherBoundedRegressionLoss()(
            student, empty, empty, avg_factor=avg_factor
        )
        assert loss.item() == 0
        loss.backward()


def test_unbounded_is_the_distance_to_the_teacher(deltas):
    """The paper's baseline, which imitates the teacher."""
    student, target, teacher = (d.clone().requires_grad_() for d in deltas)
    loss = TeacherBoundedRegressionLoss(
        bounded=False, loss_weight=1.0, reduction='sum'
    )
    value = loss(student, target, teacher)
    expected = sum(
        (s - t) ** 2
        for s, t in zip(
            deltas[0].flatten().tolist(),
            deltas[2].flatten().tolist(),
            strict=True,
        )
    )
    assert value.item() == pytest.approx(expected)
    value.backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, 2 * (deltas[0] - deltas[2]))


def test_options_outside_their_range():
    with pytest.raises(ConfigError, match=r'margin must be at least 0, got -'):
        TeacherBoundedRegressionLoss(margin=-1)
    with pytest.raises(ConfigError, match=r'margin must be at least 0, got -'):
        teacher_bounded_regression_loss(*[torch.zeros(2, 4)] * 3, margin=-1)


def test_unequal_shapes_are_named():
    loss = TeacherBoundedRegressionLoss()
    message = r'pred \(2, 4\), target \(2, 4\), teacher \(2, 8\)'
    with pytest.raises(ShapeError, match=message):
        loss(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 8))


def test_unbounded_is_plain_l2_towards_the_teacher(deltas):
    student, target, teacher = deltas
    student.requires_grad_()
    loss = TeacherBoundedRegressionLoss(
        bounded=False, loss_weight=1.0, reduction='none'
    )(student, target, teacher)
    expected = [
        sum((a - b) ** 2 for a, b in zip(s, t, strict=True))
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    torch.testing.assert_close(loss.detach(), torch.tensor(expected))
    loss.sum().backward()
    torch.testing.assert_close(student.grad, 2 * (student - teacher).detach())
