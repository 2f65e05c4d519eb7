"""Layers between a student's feature and its teacher's."""

import pytest
import torch
from torch import nn

from mmkd.detectors.adapters import (
    build_adapter,
    check_levels,
    check_sizes,
    resize_to,
)
from mmkd.errors import ConfigError


def feature(*shape):
    return torch.zeros(shape)


def test_a_map_is_adapted_by_a_1x1_convolution():
    adapter = build_adapter(
        feature(2, 8, 5, 6), feature(2, 16, 5, 6), adapt=True, where='x'
    )
    assert isinstance(adapter, nn.Conv2d)
    assert adapter.weight.shape == (16, 8, 1, 1)
    assert adapter.bias.shape == (16,)
    # It sees one position at a time.
    x = torch.randn(1, 8, 5, 6, requires_grad=True)
    adapter(x)[0, :, 2, 3].sum().backward()
    assert x.grad.nonzero()[:, 2:].unique(dim=0).tolist() == [[2, 3]]


def test_vectors_are_adapted_by_a_linear_layer():
    adapter = build_adapter(
        feature(9, 8), feature(9, 16), adapt=True, where='x'
    )
    assert isinstance(adapter, nn.Linear)
    assert adapter.weight.shape == (16, 8)


@pytest.mark.parametrize('shape', [(2, 8, 5, 6), (9, 8)])
def test_equal_widths_are_adapted_too(shape):
    """The paper finds that it helps."""
    x = torch.randn(shape)
    adapter = build_adapter(x, x, adapt=True, where='x')
    assert sum(p.numel() for p in adapter.parameters()) == 8 * 8 + 8
    assert not torch.allclose(adapter(x), x)
    same = build_adapter(x, x, adapt=False, where='x')
    assert same(x) is x
    assert not list(same.parameters())


def test_widths_that_cannot_meet():
    with pytest.raises(
        ConfigError,
        match=r'here: without adaptation .* has 8 channels, the '
        r'teacher 16. Set adapt=True',
    ):
        build_adapter(
            feature(2, 8, 5, 5),
            feature(2, 16, 5, 5),
            adapt=False,
            where='here',
        )


@pytest.mark.parametrize(
    ('student', 'teacher'),
    [
        ((2, 8, 5, 5), (9, 8)),
        ((9, 8), (2, 8, 5, 5)),
        ((2, 7, 8), (2, 7, 8)),
    ],
)
def test_only_maps_and_vectors_meet(student, teacher):
    with pytest.raises(ConfigError, match=r'here: .*both must be maps .*Tap'):
        build_adapter(
            feature(*student), feature(*teacher), adapt=True, where='here'
        )


def test_resizing_is_bilinear_and_never_crops():
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 2, 3, 4)
    # Halved, each pixel is the mean of two; 3 rows of equal values stay so.
    half = resize_to(ramp, torch.Size((1, 5, 3, 2)))
    assert half.tolist() == [[[[0.5, 2.5]] * 3] * 2]
    double = resize_to(ramp, torch.Size((1, 5, 3, 8)))
    assert double[0, 0, 0].tolist() == [
        0,
        0.25,
        0.75,
        1.25,
        1.75,
        2.25,
        2.75,
        3,
    ]


def test_resizing_leaves_what_already_fits():
    x = torch.randn(1, 2, 3, 4)
    assert resize_to(x, torch.Size((7, 9, 3, 4))) is x
    vectors = torch.randn(5, 6)
    assert resize_to(vectors, torch.Size((5, 8))) is vectors


@pytest.mark.parametrize(
    ('ours', 'theirs'), [(25, 24), (40, 41), (3, 2), (1, 2), (9, 7)]
)
def test_sizes_may_differ_by_rounding(ours, theirs):
    maps = (feature(1, 8, ours, 10),), (feature(1, 8, theirs, 10),)
    check_sizes(*maps, resize=False, where='x')


@pytest.mark.parametrize(('ours', 'theirs'), [(40, 20), (20, 40), (5, 3)])
def test_sizes_may_not_differ_by_a_factor(ours, theirs):
    same = feature(1, 8, 40, 40)
    maps = (same, feature(1, 8, ours, 9)), (same, feature(1, 8, theirs, 9))
    with pytest.raises(
        ConfigError,
        match=rf'here: level 1 is \({ours}, 9\) in the student and '
        rf'\({theirs}, 9\) in the teacher.*resize=True',
    ):
        check_sizes(*maps, resize=False, where='here')
    check_sizes(*maps, resize=True, where='here')


def test_there_have_to_be_as_many_levels():
    with pytest.raises(
        ConfigError, match=r'here: the student gives 2 levels, the teacher 1'
    ):
        check_levels((feature(1, 8),) * 2, (feature(1, 8),), 'here')
