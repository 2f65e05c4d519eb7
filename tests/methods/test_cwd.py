"""Channel-wise distillation."""

import math

import pytest
import torch

from mmkd.errors import ConfigError
from mmkd.methods.cwd import channel_divergence
from tests.helpers import tiny_dense
from tests.helpers import tiny_detectors as tiny
from tests.helpers.feature_maps import (
    Pair,
    images_of,
    pointwise,
    random_maps,
    twin,
    weights_of,
)
from tests.helpers.logit_pair import Pair as ClassPair


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


def reference(ours, theirs, temperature):
    """The KL of the channels of the maps of one image, value by value."""
    total = 0.0
    for s, t in zip(ours, theirs, strict=True):
        s, t = (
            [v / temperature for v in channel.flatten().tolist()]
            for channel in (s, t)
        )
        sum_s, sum_t = (sum(map(math.exp, values)) for values in (s, t))
        for a, b in zip(s, t, strict=True):
            p, q = math.exp(a) / sum_s, math.exp(b) / sum_t
            total += q * math.log(q / p)
    return temperature**2 * total / len(ours)


def test_by_hand():
    """Odds of 1:1 in the student against 3:1 in the teacher."""
    student = torch.zeros(1, 1, 1, 2)
    teacher = torch.tensor([[[[math.log(3.0), 0.0]]]])
    loss = channel_divergence(student, teacher, weights_of([(1, 2)], 1, 2), 1)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
def test_the_formula(temperature):
    student, teacher = (random_maps(3, 4, 5, 6, seed=n) for n in (1, 2))
    sizes = [(5, 6), (3, 6), (2, 1)]
    loss = channel_divergence(
        student, teacher, weights_of(sizes, 5, 6), temperature
    )
    each = [
        reference(s[:, :h, :w], t[:, :h, :w], temperature)
        for s, t, (h, w) in zip(student, teacher, sizes, strict=True)
    ]
    assert loss.item() == pytest.approx(sum(each) / 3, rel=1e-5)


def test_a_shift_of_a_channel_is_no_difference():
    teacher = random_maps(2, 4, 5, 6)
    student = teacher + random_maps(2, 4, 1, 1, seed=3)
    weights = weights_of([(5, 6), (4, 4)], 5, 6)
    assert channel_divergence(student, teacher, weights, 1).abs() < 1e-6
    assert channel_divergence(2 * student, teacher, weights, 1) > 1e-2


def test_the_gradient_is_that_of_the_formula():
    student, teacher = (random_maps(1, 2, 2, 3, seed=n) for n in (1, 2))
    student.requires_grad_()
    weights = weights_of([(2, 2)], 2, 3)
    channel_divergence(student, teacher, weights, 2.0).backward()
    p, q = (
        (m[..., :2] / 2).flatten(2).softmax(-1).view(1, 2, 2, 2)
        for m in (student.detach(), teacher)
    )
    expected = torch.zeros_like(student)
    expected[..., :2] = 2**2 * (p - q) / 2 / 2  # T^2 / T / C
    assert torch.allclose(student.grad, expected, atol=1e-6)


def test_on_detectors():
    pair = Pair(
        'CWD', tiny.faster_rcnn(), temperature=2.0, loss_weight=3.0, levels=[1]
    )
    losses = pair.step(sizes=((96, 128), (64, 96)))
    ours, theirs = pair.features()
    each = [
        reference(s, t, 2.0)
        for s, t in zip(
            images_of(ours[1], pair.samples),
            images_of(theirs[1], pair.samples),
            strict=True,
        )
    ]
    assert losses.keys() == {'cwd'}
    assert losses['cwd'].item() == pytest.approx(3 * sum(each) / 2, rel=1e-4)


def test_levels_are_summed():
    levels = [
        Pair('CWD', levels=chosen).step()['cwd'].item()
        for chosen in ([0], [1], [0, 1])
    ]
    assert levels[0] + levels[1] == pytest.approx(levels[2], rel=1e-5)


def test_the_teacher_itself_is_the_minimum():
    pair = Pair('CWD')
    assert pair.step()['cwd'] > 0
    twin(pair)
    assert pair.step()['cwd'].abs() < 1e-5


def test_class_scores():
    pair = Pair('CWD', tiny.retinanet(), source='bbox_head.retina_cls')
    assert len(pair.method.adapters) == 5
    assert pair.step()['cwd'] > 0


@pytest.mark.parametrize(
    ('teacher', 'classes'),
    [
        (tiny.gfl(), tiny.CLASSES[::-1]),
        (tiny.gfl(bbox_head__num_classes=2), tiny.CLASSES[:2]),
        (tiny_dense.atss(), tiny.CLASSES[::-1]),
    ],
)
@pytest.mark.parametrize('method', ['CWD', 'PKD', 'FGD'])
def test_scores_of_other_classes_are_refused(method, teacher, classes):
    """Channel by channel, the cat's would meet the cow's."""
    scores = {'GFLHead': 'gfl_cls', 'ATSSHead': 'atss_cls'}
    options = dict(
        source='bbox_head.gfl_cls',
        teacher_source=f'bbox_head.{scores[teacher.bbox_head.type]}',
    )
    pair = ClassPair(
        method, tiny.gfl(), teacher, teacher_classes=classes, **options
    )
    with pytest.raises(
        ConfigError,
        match=rf'{method} on "bbox_head.gfl_cls": class scores meet channel by'
        rf'.* got cat, dog, cow in the student and {", ".join(classes)} in',
    ):
        pair.step()
    pair = ClassPair(
        method,
        tiny.gfl(),
        teacher,
        teacher_classes=classes,
        adapt=True,
        **options,
    )
    assert all(loss > 0 for loss in pair.losses().values())


@pytest.mark.parametrize(
    'source', ['neck', 'bbox_head.cls_convs.1', 'bbox_head.gfl_reg']
)
def test_other_features_know_no_classes(source):
    pair = ClassPair(
        'CWD',
        tiny.gfl(),
        teacher_classes=tiny.CLASSES[::-1],
        source=source,
    )
    assert pair.losses()['cwd'] > 0


@pytest.mark.parametrize('temperature', [0, -1.0, float('nan')])
def test_temperatures_that_cannot_be(temperature):
    with pytest.raises(ConfigError, match=r'CWD\.temperature must be above 0'):
        Pair('CWD', pointwise(), temperature=temperature)


def test_defaults():
    method = Pair('CWD').method
    assert (method.temperature, method.loss_weight) == (1.0, 10.0)
    assert (method.source, method.adapt) == ('neck', None)
