"""The bootstrap over images, against pycocotools on images drawn for real."""

import copy

import numpy as np
import pytest
from scipy import stats

from mmkd.report.bootstrap import (
    ClassHits,
    average_precisions,
    hits_of,
    paired_bootstrap,
)
from mmkd.report.eval_coco import evaluate, evaluation_of

ALL = slice(None)


def made(rng, images=12, classes=2, noise=6.0):
    """Ground truth with a crowd and a class of one object, and detections."""
    truth = {
        'images': [{'id': 10 + i} for i in range(images)],
        'categories': [{'id': c, 'name': f'c{c}'} for c in range(classes)],
        'annotations': [],
    }
    results = []
    for image in truth['images']:
        for _ in range(int(rng.integers(0, 5))):
            box = [*rng.uniform(0, 200, 2), *rng.uniform(20, 60, 2)]
            row = {
                'id': len(truth['annotations']) + 1,
                'image_id': image['id'],
                'category_id': int(rng.integers(classes)),
                'bbox': box,
                'area': box[2] * box[3],
                'iscrowd': int(rng.random() < 0.1),
            }
            truth['annotations'].append(row)
            for _ in range(2):
                moved = np.array(box) + rng.normal(0, noise, 4)
                results.append(
                    {
                        'image_id': image['id'],
                        'category_id': row['category_id'],
                        'bbox': np.maximum(moved, 1).tolist(),
                        'score': float(rng.random()),
                    }
                )
    return truth, results


def drawn(truth, results, numbers):
    """The data set of the images drawn, each copy an image of its own."""
    new = {**truth, 'images': [], 'annotations': []}
    found = []
    for copy_id, number in enumerate(numbers, start=1000):
        image = truth['images'][number]['id']
        new['images'].append({'id': copy_id})
        for row in truth['annotations']:
            if row['image_id'] == image:
                number = len(new['annotations']) + 1
                new['annotations'].append(
                    {**row, 'image_id': copy_id, 'id': number}
                )
        found += [
            {**row, 'image_id': copy_id}
            for row in results
            if row['image_id'] == image
        ]
    return new, found


def test_a_draw_is_what_pycocotools_makes_of_it():
    rng = np.random.default_rng(5)
    truth, results = made(rng)
    hits = hits_of(evaluation_of(truth, copy.deepcopy(results), 'bbox'))
    draws = rng.integers(12, size=(8, 12))
    counts = np.array([np.bincount(draw, minlength=12) for draw in draws])
    scores = [evaluate(*drawn(truth, results, d), 'bbox') for d in draws]
    for key, thresholds in (('AP', ALL), ('AP50', slice(0, 1))):
        found = average_precisions(hits, counts, thresholds)
        expected = [each.figures[key] for each in scores]
        assert found == pytest.approx(expected, abs=1e-9)
        assert np.ptp(found) > 0.02


def gains(truth, ours, theirs, resamples):
    """Gains in AP over draws, each evaluated by pycocotools."""
    rng = np.random.default_rng(99)
    for _ in range(resamples):
        numbers = rng.integers(12, size=12)
        ap = [
            evaluate(*drawn(truth, rows, numbers), 'bbox').figures['AP']
            for rows in (ours, theirs)
        ]
        yield ap[0] - ap[1]


def test_the_interval_is_that_of_an_independent_bootstrap():
    rng = np.random.default_rng(2)
    truth, theirs = made(rng, noise=8.0)
    _, ours = made(np.random.default_rng(2), noise=3.0)
    plain, distilled = (
        [hits_of(evaluation_of(truth, copy.deepcopy(rows), 'bbox'))]
        for rows in (theirs, ours)
    )
    found = paired_bootstrap(plain, distilled)
    expected = list(gains(truth, ours, theirs, 60))
    spread = np.std(expected)
    low, high = np.percentile(expected, [2.5, 97.5])
    # 60 draws know these percentiles to within about half of the spread.
    assert found.low == pytest.approx(low, abs=0.8 * spread)
    assert found.high == pytest.approx(high, abs=0.8 * spread)
    assert found.low < np.mean(expected) < found.high
    assert found.count == 12
    assert paired_bootstrap(plain, distilled) == found


def test_a_mean_is_bootstrapped_as_scipy_does():
    """One object an image, found or missed by a sure box: AP is a share.

    All boxes are right and have one score, so that AP is the share of images
    that are found, read at 101 recalls.
    """
    rng = np.random.default_rng(0)

    def hits(seen):
        places = np.flatnonzero(seen)
        right = np.ones((10, len(places)), bool)
        return [
            ClassHits(places, places, right, ~right, np.ones(len(seen), int))
        ]

    plain, ours = rng.random(60) < 0.4, rng.random(60) < 0.7
    found = paired_bootstrap([hits(plain)], [hits(ours)], resamples=2000)
    expected = stats.bootstrap(
        (ours.astype(float), plain.astype(float)),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        method='percentile',
        n_resamples=4000,
        vectorized=True,
        random_state=1,
    ).confidence_interval
    assert found.low == pytest.approx(expected.low, abs=0.02)
    assert found.high == pytest.approx(expected.high, abs=0.02)


def test_equal_detections_gain_nothing_however_they_are_drawn():
    truth, results = made(np.random.default_rng(3))
    hits = hits_of(evaluation_of(truth, results, 'bbox'))
    found = paired_bootstrap([hits], [hits])
    assert (found.low, found.high) == (0, 0)


def test_one_image_with_objects_has_no_interval():
    truth, results = made(np.random.default_rng(3))
    first = truth['annotations'][0]['image_id']
    truth['annotations'] = [
        {**row, 'iscrowd': 0}
        for row in truth['annotations']
        if row['image_id'] == first
    ]
    hits = hits_of(evaluation_of(truth, results, 'bbox'))
    assert paired_bootstrap([hits], [hits]) is None
    assert paired_bootstrap([[]], [[]]) is None
