"""The hint loss, also inside one of MMDetection's own configs."""

import pytest
import torch

from mmkd.errors import ConfigError, ShapeError
from mmkd.losses import HintLoss, hint_loss
from tests.helpers import tiny_detectors as tiny


def reference(student, teacher, norm):
    """The mean over elements, in plain Python floats."""
    total, count = 0.0, 0
    for s, t in zip(
        student.flatten().tolist(), teacher.flatten().tolist(), strict=True
    ):
        total += (s - t) ** 2 if norm == 'l2' else abs(s - t)
        count += 1
    return torch.tensor(total / count)


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2)]


@pytest.mark.parametrize('norm', ['l2', 'l1'])
def test_is_the_mean_distance(maps, norm):
    loss = HintLoss(norm=norm)
    torch.testing.assert_close(loss(*maps), reference(*maps, norm))
    vectors = [m.flatten(1) for m in maps]
    torch.testing.assert_close(loss(*vectors), reference(*vectors, norm))


@pytest.mark.parametrize('norm', ['l2', 'l1'])
def test_student_equal_to_teacher_is_0(maps, norm):
    student = maps[0].clone().requires_grad_()
    loss = HintLoss(norm=norm)(student, maps[0])
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()


def test_gradient_reaches_the_student_and_never_the_teacher(maps):
    student, teacher = (m.clone().requires_grad_() for m in maps)
    HintLoss()(student, teacher).backward()
    assert teacher.grad is None
    torch.testing.assert_close(
        student.grad, 2 * (maps[0] - maps[1]) / maps[0].numel()
    )


def test_weight_average_and_reductions(maps):
    squares = (maps[0] - maps[1]) ** 2
    weight = torch.rand(2, 1, 4, 5)
    loss = HintLoss()
    close = torch.testing.assert_close
    close(loss(*maps, weight), (squares * weight).mean())
    close(loss(*maps, weight, avg_factor=6), (squares * weight).sum() / 6)
    close(loss(*maps, reduction_override='sum'), squares.sum())
    close(loss(*maps, reduction_override='none'), squares)
    close(HintLoss(loss_weight=3.0)(*maps), 3 * squares.mean())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_safe(dtype):
    student = torch.full((1, 2, 2, 2), 300.0, dtype=dtype, requires_grad=True)
    loss = HintLoss()(student, torch.zeros(1, 2, 2, 2, dtype=dtype))
    loss.backward()
    assert (loss.dtype, loss.item()) == (torch.float32, 300.0**2)
    assert student.grad.flatten().tolist() == [75.0] * 8  # 2 * 300 / 8


def test_no_vectors_give_0_with_a_gradient():
    student = torch.zeros(0, 8, requires_grad=True)
    loss = HintLoss()(student, torch.zeros(0, 8))
    assert loss.item() == 0
    loss.backward()


def test_options_outside_their_range():
    message = r"HintLoss\.norm must be one of 'l2', 'l1', got 'l3'"
    with pytest.raises(ConfigError, match=message):
        HintLoss(norm='l3')
    with pytest.raises(ConfigError, match=r'hint_loss\.norm must be one of'):
        hint_loss(torch.zeros(1), torch.zeros(1), norm='l3')


def test_unequal_shapes_say_what_to_do():
    with pytest.raises(ShapeError, match='Adapt the width and resize'):
        HintLoss()(torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4))


def test_works_inside_a_stock_detector():
    # L1 between deltas is what MMDetection's L1Loss computes there.
    batch = None
    values = {}
    for type_ in ('L1Loss', 'mmkd.HintLoss'):
        loss = dict(type=type_, loss_weight=1.0)
        if type_ == 'mmkd.HintLoss':
            loss['norm'] = 'l1'
        config = tiny.faster_rcnn()
        config.roi_head.bbox_head.loss_bbox = loss
        model = tiny.build(config)
        batch = batch or tiny.batch_for(model)
        values[type_] = tiny.seeded_loss(model, *batch)['loss_bbox']
    assert values['L1Loss'].item() > 0
    torch.testing.assert_close(values['mmkd.HintLoss'], values['L1Loss'])
