"""What a teacher answers to test images, and how two answers compare."""

import copy
import math

import pytest
import torch

from mmkd.teachers.probe import difference, probe
from tests.helpers import faster
from tests.helpers import tiny_detectors as tiny


@pytest.fixture(scope='module')
def model():
    return faster.trained(tiny.faster_rcnn())


def test_all_parts_and_taps(model):
    tap = 'roi_head.bbox_head.shared_fcs.1'
    teacher = tiny.wrap(model, ('backbone.layer2', tap, 'backbone.layer9'))
    parts = probe(teacher, (0, 1))
    maps, rpn, roi = 'the feature maps', 'the RPN', 'RoI stage 0'
    assert list(parts) == [maps, rpn, roi, 'backbone.layer2', tap]
    assert [len(parts[p]) for p in parts] == [5, 10, 2, 1, 1]
    assert parts[roi][0].shape == (2 * 2, 4)  # RoIs, classes + 1
    assert difference(probe(teacher, (0, 1)), parts) == (0, '')


@pytest.mark.parametrize(
    ('changed', 'part'),
    [
        ('backbone.layer4.1.conv2', 'the feature maps'),
        ('rpn_head.rpn_reg', 'the RPN'),
        ('roi_head.bbox_head.fc_cls', 'RoI stage 0'),
    ],
)
def test_a_change_shows_in_its_part(model, changed, part):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_submodule(changed).weight[0] *= 1.5
    ours, theirs = (probe(tiny.wrap(each)) for each in (model, other))
    only = [{part: parts[part]} for parts in (ours, theirs)]
    worst, where = difference(*only)
    assert worst > 0.01
    assert where == part
    earlier = list(ours)[: list(ours).index(part)]
    same = [{p: parts[p] for p in earlier} for parts in (ours, theirs)]
    assert difference(*same) == (0, '')


def test_hand_worked_differences():
    a, b = torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0])
    assert difference({'x': [b]}, {'x': [a]}) == (0.5 / 4, 'x')
    assert difference({'x': [a], 'y': [b]}, {'x': [a], 'y': [a]})[1] == 'y'
    nan = torch.tensor([math.nan, -4.0])
    for other in ({}, {'x': []}, {'x': [a[:1]]}, {'x': [nan]}):
        assert difference(other, {'x': [a]}) == (math.inf, 'x')
    empty = torch.zeros(0, 4)
    assert difference({'x': [empty]}, {'x': [empty]}) == (0, '')
