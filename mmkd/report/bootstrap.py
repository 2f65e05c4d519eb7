"""How far average precisions depend on which images happen to be there."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.cocoeval import COCOeval

from .verdict import LEVEL, Interval

RECALLS = np.linspace(0, 1, 101)
"""Where COCO reads the precision."""
RESAMPLES = 1000
WORK = 2_000_000_000
"""Matches that are summed up at most; large data get fewer resamples."""
FEWEST = 100
"""The fewest resamples."""
CHUNK = 5_000_000
"""Matches that are summed up at once."""


@dataclass
class ClassHits:
    """The detections of a class by falling score, and what they found.

    Attributes:
        scores: Their scores (N).
        images: The position of each detection's image (N).
        right: Whether it found an object, by IoU threshold (T, N).
        wrong: Whether it counts as false; neither is what is ignored.
        objects: The number of objects in each image.
    """

    scores: np.ndarray
    images: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    objects: np.ndarray


def hits_of(evaluator: COCOeval) -> list[ClassHits]:
    """Take the matches of all object sizes from an evaluation by COCO."""
    settings = evaluator.params
    images, sizes = len(settings.imgIds), len(settings.areaRng)
    found = []
    for number in range(len(settings.catIds)):
        start = number * sizes * images
        rows = [
            (i, row)
            for i, row in enumerate(evaluator.evalImgs[start : start + images])
            if row is not None
        ]
        objects = np.zeros(images, np.int64)
        for i, row in rows:
            objects[i] = np.count_nonzero(np.logical_not(row['gtIgnore']))
        if not objects.any():
            continue  # it does not count
        scores = np.concatenate([row['dtScores'] for _, row in rows])
        order = np.argsort(-scores, kind='stable')
        matched, ignored = (
            np.concatenate([row[key] for _, row in rows], 1)[:, order] != 0
            for key in ('dtMatches', 'dtIgnore')
        )
        places = np.concatenate(
            [np.full(len(row['dtScores']), i) for i, row in rows]
        )
        found.append(
            ClassHits(
                scores[order],
                places[order],
                matched & ~ignored,
                ~matched & ~ignored,
                objects,
            )
        )
    return found


def average_precisions(
    classes: Sequence[ClassHits], counts: np.ndarray, thresholds: slice
) -> np.ndarray:
    """Compute COCO's AP for draws of images.

    Only boxes that find an object change the recall, so that the curve is
    computed at these alone.

    Args:
        classes: The detections.
        counts: How many times each image counts in each draw (R, images).
        thresholds: The IoU thresholds to average over, of COCO's ten.

    Returns:
        The AP of each draw (R).
    """
    sums, number = np.zeros(len(counts)), np.zeros(len(counts))
    for hits in classes:
        totals = counts @ hits.objects
        weights = counts[:, hits.images]
        for right, wrong in zip(
            hits.right[thresholds], hits.wrong[thresholds], strict=True
        ):
            number += totals > 0
            places = np.flatnonzero(right)
            if not places.size:
                continue
            end = places[-1] + 1
            true = np.cumsum(weights[:, places], 1)
            false = np.cumsum(weights[:, :end] * wrong[:end], 1)[:, places]
            precision = true / np.maximum(true + false, 1)
            # The best precision at this recall or a higher one.
            best = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
            recall = true / np.maximum(totals, 1)[:, None]
            reached = np.searchsorted(RECALLS, recall, side='right')
            steps = np.diff(reached, axis=1, prepend=0)
            sums += (steps * best).sum(1) / len(RECALLS)
    return sums / np.maximum(number, 1)


def paired_bootstrap(
    plain: Sequence[Sequence[ClassHits]],
    distilled: Sequence[Sequence[ClassHits]],
    metric: str = 'AP',
    resamples: int = RESAMPLES,
) -> Interval | None:
    """Return the percentile interval of the gain in AP over the images.

    The images are drawn with replacement, and both networks are evaluated on
    those drawn, so that a hard image is hard for both.

    Args:
        plain: The plain student's detections, once for each of its seeds,
            whose mean counts.
        distilled: The same of the distilled student.
        metric: ``AP`` or ``AP50``.
        resamples: The number of draws, fewer on large data.

    Returns:
        The interval; None if fewer than two images hold objects.
    """
    runs = [*plain, *distilled]
    if not runs[0]:
        return None
    holds = np.sum([hits.objects for hits in runs[0]], axis=0)
    if np.count_nonzero(holds) < 2:
        return None
    number = len(holds)
    thresholds = slice(0, 1) if metric == 'AP50' else slice(None)
    sizes = [h.right[thresholds].size for classes in runs for h in classes]
    resamples = min(resamples, max(FEWEST, WORK // max(sum(sizes), 1)))
    rows = max(CHUNK // max(len(holds), *sizes), 1)
    draws = np.random.default_rng(0)
    gains: list[float] = []
    while len(gains) < resamples:
        part = min(rows, resamples - len(gains))
        drawn = draws.integers(number, size=(part, number))
        counts = np.array(
            [np.bincount(row, minlength=number) for row in drawn]
        )
        ours, theirs = (
            np.mean(
                [average_precisions(c, counts, thresholds) for c in each], 0
            )
            for each in (distilled, plain)
        )
        gains.extend(ours - theirs)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(gains, [tail, 100 - tail])
    return Interval(float(low), float(high), number)
