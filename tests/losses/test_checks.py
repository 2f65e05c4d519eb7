"""Checks of what users pass to the losses."""

import math

import pytest
import torch

from mmkd.errors import ConfigError, MMKDError, ShapeError
from mmkd.losses.checks import (
    check_axes,
    check_choice,
    check_not_negative,
    check_positive,
    check_same_shape,
)


@pytest.mark.parametrize(
    'value', [0, -1, math.nan, math.inf, True, None, '1', [1.0]]
)
def test_what_is_not_above_0(value):
    with pytest.raises(ConfigError) as caught:
        check_positive('CWDLoss', temperature=value)
    message = f'CWDLoss.temperature must be above 0, got {value!r}.'
    assert str(caught.value) == message


def test_what_is_above_0():
    check_positive('x', a=1, b=1e-9, c=float(torch.tensor(2.0)))


@pytest.mark.parametrize('value', [-1e-9, math.nan, math.inf, False, '1'])
def test_what_is_below_0(value):
    with pytest.raises(ConfigError, match=r'^x\.beta must be at least 0, got'):
        check_not_negative('x', alpha=0, beta=value)


def test_choices():
    check_choice('x', ('l1', 'l2'), norm='l2')
    with pytest.raises(
        ConfigError, match=r"x\.norm must be one of 'l1', 'l2'"
    ):
        check_choice('x', ('l1', 'l2'), norm='l3')


def test_shapes():
    a, b = torch.zeros(2, 3), torch.zeros(2, 4)
    check_same_shape('x', pred=a, target=a)
    with pytest.raises(ShapeError) as caught:
        check_same_shape('x', 'Do this.', pred=a, target=b)
    assert str(caught.value) == (
        'x compares tensors of the same shape, got pred (2, 3), '
        'target (2, 4). Do this.'
    )
    check_axes('x', a, 'N C')
    with pytest.raises(ShapeError, match=r'^x compares tensors \(N, C\), got'):
        check_axes('x', a[0], 'N C')


def test_they_are_errors_of_a_user():
    for error in (ConfigError, ShapeError):
        assert issubclass(error, MMKDError)
        assert issubclass(error, ValueError)
