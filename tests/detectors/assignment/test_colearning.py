"""Indicators and the switch between networks, against plain loops."""

import math
import random
import statistics

import pytest
import torch

from mmkd.detectors.assignment.colearning import (
    find_indicator,
    fisher,
    std_mean,
    switch,
)
from mmkd.errors import ConfigError
from mmkd.registry import INDICATORS
from tests.detectors.assignment.test_paa import candidates


def groups_of(costs, groups, number):
    return [
        [
            c
            for c, g in zip(costs.tolist(), groups.tolist(), strict=True)
            if g == n
        ]
        for n in range(number)
    ]


@pytest.fixture
def grouped():
    chance = random.Random(0)
    groups = torch.tensor([chance.randrange(6) for _ in range(60)])
    costs = torch.tensor([chance.uniform(0.5, 4) for _ in range(60)])
    return costs, groups


def test_std_mean_by_loops(grouped):
    costs, groups = grouped
    scores = std_mean(costs, groups, 7)
    for score, members in zip(scores, groups_of(*grouped, 7), strict=True):
        if not members:
            assert score.isnan()
            continue
        expected = statistics.stdev(members) / statistics.mean(members)
        assert score.item() == pytest.approx(expected, rel=1e-6)


def test_fisher_by_hand():
    """Two clear parts: (5 - 1)^2 / (0.01 + 0.04)."""
    low, high = [0.9, 1.0, 1.1], [4.8, 5.0, 5.2]
    costs = torch.tensor([*low, 7.0, *high], dtype=torch.float64)
    groups = torch.tensor([1, 1, 1, 0, 1, 1, 1])
    scores = fisher(costs, groups, 3)
    assert scores[1].item() == pytest.approx(16 / (0.01 + 0.04), rel=1e-9)
    assert scores[0] == 0  # a single candidate has no two parts
    assert scores[2] == 0
    assert fisher(costs[:0], groups[:0], 2).tolist() == [0, 0]


@pytest.mark.parametrize('name', ['std_mean', 'fisher'])
def test_the_switch_by_loops(name):
    chance = random.Random(1)
    n, objects = 80, 5
    made = candidates(
        [chance.randrange(2) for _ in range(n)],
        [chance.randrange(objects) for _ in range(n)],
        objects + 1,  # one without candidates
    )
    costs = [
        torch.tensor([chance.uniform(0.5, 4) for _ in range(n)])
        for _ in range(3)
    ]
    indicator = find_indicator(name, 'here')
    result = switch(made, costs, indicator)
    decided = [0, 0, 0]
    cells = list(zip(made.objects.tolist(), made.levels.tolist(), strict=True))
    for cell in set(cells):
        where = torch.tensor([i for i in range(n) if cells[i] == cell])
        zeros = torch.zeros(len(where), dtype=torch.long)
        scores = [indicator(c[where], zeros, 1).item() for c in costs]
        if len(where) == 1:
            scores = [-c[where].item() for c in costs]
        best = scores.index(max(scores))
        decided[best] += 1
        assert torch.equal(result.costs[where], costs[best][where])
    expected = [count / len(set(cells)) for count in decided]
    assert result.share.tolist() == pytest.approx(expected)


def test_a_single_candidate_goes_to_the_cheaper():
    made = candidates([0, 1, 1], [0, 0, 0], 1)
    costs = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2.0, 1.0, 1.1])]
    result = switch(made, costs, std_mean)
    assert result.costs.tolist() == [2.0, 1.0, 2.0]
    assert result.share.tolist() == [0.5, 0.5]


def test_equal_networks_the_first_decides():
    made = candidates([0, 0, 1], [0, 0, 0], 1)
    costs = torch.tensor([3.0, 1.0, 2.0])
    result = switch(made, [costs, costs.clone()], std_mean)
    assert result.share.tolist() == [1, 0]


@pytest.mark.parametrize('bad', [math.nan, math.inf])
@pytest.mark.parametrize('place', [0, 1])
def test_a_network_without_costs_decides_nothing(bad, place):
    made = candidates([0, 0, 1], [0, 0, 0], 1)
    good = torch.tensor([3.0, 1.0, 2.0])
    costs = [good, torch.full((3,), bad)]
    if place == 0:
        costs.reverse()
    result = switch(made, costs, std_mean)
    assert torch.equal(result.costs, good)
    assert result.share[1 - place] == 1


def test_no_candidates():
    made = candidates([], [], 2)
    nothing = torch.zeros(0)
    result = switch(made, [nothing, nothing], std_mean)
    assert result.costs.shape == (0,)
    assert result.share.tolist() == [0, 0]


def test_an_indicator_of_ones_own():
    @INDICATORS.register_module(name='always_second')
    def always_second(costs, groups, number):
        return torch.full((number,), costs.mean().item())

    made = candidates([0, 0, 1, 1], [0, 0, 0, 0], 1)
    costs = [torch.ones(4), torch.full((4,), 9.0)]
    found = find_indicator('always_second', 'here')
    assert switch(made, costs, found).share.tolist() == [0, 1]


def test_a_misspelt_indicator():
    with pytest.raises(ConfigError, match='Did you mean "std_mean"'):
        find_indicator('std_maen', 'CoLearningAssignment.indicator')
