"""The batched mixture fit against scikit-learn's, object by object."""

import math

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from mmkd.benchmark.paa_reference import reference
from mmkd.detectors.assignment import fit_mixtures, positive_samples


def padded(rows):
    """Sorted rows of different lengths as a matrix and its mask."""
    width = max(map(len, rows))
    values = torch.full((len(rows), width), math.inf)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        values[i, : len(row)] = torch.tensor(sorted(row))
        mask[i, : len(row)] = True
    return values, mask


def random_rows(kind, number, seed):
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(number):
        n = random.integers(10, 46)
        if kind == 'skewed':
            row = random.gamma(2, 1, n) + 0.5
        elif kind == 'one bump':
            row = random.normal(4, 1, n)
        else:
            few = n // 3
            row = np.concatenate(
                [random.normal(2, 0.3, few), random.normal(5, 1, n - few)]
            )
        rows.append(row.astype(np.float32))
    return rows


@pytest.mark.parametrize('kind', ['skewed', 'one bump', 'two bumps'])
def test_partition_of_scikit_learn(kind):
    rows = random_rows(kind, 150, seed=len(kind))
    values, mask = padded(rows)
    positive = positive_samples(values, mask)
    fitted = fit_mixtures(values, mask)
    for i, row in enumerate(rows):
        expected, steps = reference(sorted(row))
        assert positive[i, : len(row)].tolist() == expected.tolist()
        assert not positive[i, len(row) :].any()
        assert fitted.steps[i] == steps


def test_single_precision_of_scikit_learn():
    """As MMDetection calls it: 99.9 % alike, or it refuses to fit."""
    rows = [
        row
        for kind in ('skewed', 'one bump', 'two bumps')
        for row in random_rows(kind, 350, seed=7)
    ]
    positive = positive_samples(*padded(rows))
    alike = refused = 0
    for i, row in enumerate(rows):
        try:
            expected, _ = reference(sorted(row), np.float32)
        except ValueError:
            refused += 1
            continue
        alike += positive[i, : len(row)].tolist() == expected.tolist()
    assert alike >= 0.999 * (len(rows) - refused)


def test_density_is_that_of_scikit_learn():
    (row,) = random_rows('two bumps', 1, seed=3)
    row = sorted(row)
    x = np.asarray(row, dtype=np.float64).reshape(-1, 1)
    mixture = GaussianMixture(
        2,
        weights_init=np.array([0.5, 0.5]),
        means_init=np.array([[x.min()], [x.max()]]),
        precisions_init=np.ones((2, 1)),
        covariance_type='diag',
    ).fit(x)
    fitted = fit_mixtures(*padded([row]))
    torch.testing.assert_close(
        fitted.log_density[0],
        torch.from_numpy(mixture.score_samples(x)),
        rtol=1e-8,
        atol=1e-8,
    )


def test_rows_do_not_know_of_each_other():
    rows = random_rows('skewed', 8, seed=1)
    together = positive_samples(*padded(rows))
    for i, row in enumerate(rows):
        alone = positive_samples(*padded([row]))[0]
        assert together[i, : len(row)].tolist() == alone.tolist()


def test_two_clear_groups():
    values = [1.0, 1.1, 1.2, 9.0, 9.1, 9.2]
    positive = positive_samples(*padded([values]))[0]
    # Of the cheap ones, up to the densest place: the middle of the three.
    assert positive.tolist() == [True, True, False, False, False, False]


class TestPathologicalCosts:
    def test_fewer_than_two(self):
        values, mask = padded([[1.0, 2.0, 8.0, 9.0], [3.0], []])
        positive = positive_samples(values, mask)
        assert positive[0].any()
        assert not positive[1:].any()
        kept = positive_samples(values, mask, keep_single=True)
        assert kept[1].tolist() == [True, False, False, False]
        assert not kept[2].any()
        assert kept[0].tolist() == positive[0].tolist()

    def test_two_samples(self):
        positive = positive_samples(*padded([[1.0, 5.0]]))[0]
        assert positive.tolist() == [True, False]

    @pytest.mark.parametrize('value', [0.0, 3.7, 1e30, 1e-42, -2.0])
    def test_identical(self, value):
        positive = positive_samples(*padded([[value] * 5]))[0]
        assert positive.tolist() == [True] + [False] * 4

    def test_collapsed_where_scikit_learn_refuses(self):
        row = [5000.0] * 20 + [5000.5]
        with pytest.raises(ValueError, match='ill-defined'):
            reference(row, np.float32)
        positive = positive_samples(*padded([row]))[0]
        expected, _ = reference([v - 5000 for v in row])
        assert positive.tolist() == expected.tolist()

    @pytest.mark.parametrize('scale', [1e30, 1e-30, 1e-42])
    def test_huge_and_tiny(self, scale):
        values = [1 * scale, 1.1 * scale, 1.2 * scale, 9 * scale]
        positive = positive_samples(*padded([values]))[0]
        assert positive[0]
        if scale > 1:
            assert not positive[3]

    @pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
    def test_not_finite_is_no_candidate(self, bad):
        good = [1.0, 1.1, 1.2, 9.0, 9.1]
        expected = positive_samples(*padded([good]))[0]
        values = torch.tensor([[*good, bad]])
        mask = torch.ones(1, 6, dtype=torch.bool)
        positive = positive_samples(values, mask)[0]
        assert positive[:5].tolist() == expected.tolist()
        assert not positive[5]
        every = torch.full((1, 4), bad)
        assert not positive_samples(every, torch.ones(1, 4) > 0).any()

    def test_no_objects(self):
        nothing = torch.zeros(0, 9)
        assert positive_samples(nothing, nothing > 0).shape == (0, 9)
        nobody = torch.zeros(3, 0)
        assert positive_samples(nobody, nobody > 0).shape == (3, 0)
