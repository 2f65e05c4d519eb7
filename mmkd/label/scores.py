"""Compare labels with ground truth: figures, calibration, thresholds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmkd.data.class_names import match_names
from mmkd.data.detections import ByName
from mmkd.data.errors import data_error, some
from mmkd.report.bootstrap import ClassHits, hits_of
from mmkd.report.eval_coco import (
    Scores,
    evaluation_of,
    figure_table,
    load_truth,
    scores_of,
)
from mmkd.report.tables import table

from .charts import figures

BINS = 10
"""The bins of the calibration, from score 0 to 1."""


@dataclass
class Comparison:
    """What the ground truth says of the labels.

    Attributes:
        scores: COCO's figures.
        bins: For each bin of scores, the number of boxes, their mean score,
            and the share that finds an object (IoU .50).
        thresholds: For each class the score of its best F1 (IoU .50), that
            F1, and its number of objects.
        images: How many images of the ground truth were labelled.
        missing: How many were not.
        left_out: Classes of the labels that the ground truth lacks.
    """

    scores: Scores
    bins: list[tuple[int, float, float]]
    thresholds: dict[str, tuple[float, float, int]]
    images: int
    missing: int
    left_out: list[str]

    @property
    def calibration_error(self) -> float:
        """The mean distance of score and share, weighted by the boxes."""
        total = sum(count for count, _, _ in self.bins)
        apart = sum(n * abs(score - share) for n, score, share in self.bins)
        return apart / total if total else 0.0

    def text(self) -> str:
        """Return all of it as tables."""
        bins = [
            [f'{i / BINS:.1f} to {(i + 1) / BINS:.1f}', str(n)]
            + [f'{value:.3f}' if n else '-' for value in (score, share)]
            for i, (n, score, share) in enumerate(self.bins)
        ]
        rows = [
            [name, str(count), f'{score:.2f}', f'{f1:.3f}']
            for name, (score, f1, count) in self.thresholds.items()
        ]
        head = f'{self.images} images of the ground truth'
        if self.missing:
            head += f' ({self.missing} others were not labelled)'
        if self.left_out:
            head += f'; it lacks the classes {some(self.left_out, 9)}'
        return '\n\n'.join(
            [
                head,
                figure_table({'result': self.scores}),
                f'calibration error {self.calibration_error:.3f} (IoU .50)',
                table(['scores', 'boxes', 'mean', 'right'], bins, 'plain'),
                'the score of the best F1 of each class (IoU .50)',
                table(['class', 'objects', 'score', 'F1'], rows, 'plain'),
            ]
        )

    def draw(self, path: Path) -> None:
        """Draw the calibration; a line below the diagonal is overconfident."""
        lines = {
            'perfect': {0: 0.0, 100: 100.0},
            'labels': {
                round(100 * score): 100 * share
                for count, score, share in self.bins
                if count
            },
        }
        figure = figures().line_chart(
            lines, 'score in per cent', 'right in per cent', (0, 100)
        )
        figure.savefig(path)


def compare(content: Mapping[str, Any], annotations: Path) -> Comparison:
    """Compare a result of ``mmkd label`` with annotations.

    Images are found by their names, and classes by theirs.

    Raises:
        DataError: If the annotations are wrong, or share no image or class.
    """
    truth = load_truth(annotations, 'bbox')
    by_name = ByName({row['file_name']: row for row in truth['images']})
    ids = {}
    for row in content['images']:
        if found := by_name.find(row['file_name']):
            ids[row['id']] = found['id']
    names = [row['name'] for row in content['categories']]
    kinds = {row['name']: row['id'] for row in truth['categories']}
    matches = match_names(names, list(kinds))
    categories = {
        row['id']: kinds[match]
        for row in content['categories']
        if (match := matches[row['name']]) is not None
    }
    for what, found in (('image', ids), ('class', categories)):
        if not found:
            raise data_error(
                annotations,
                'annotations of the images that were labelled',
                f'no {what} of the labels',
                'Give the annotations of these images.',
            )
    labelled = {*ids.values()}
    total = len(truth['images'])
    truth = _restricted(truth, labelled, {*categories.values()})
    rows = [
        dict(
            image_id=ids[row['image_id']],
            category_id=categories[row['category_id']],
            bbox=row['bbox'],
            score=row['score'],
        )
        for row in content['annotations']
        if row['image_id'] in ids and row['category_id'] in categories
    ]
    evaluator = evaluation_of(truth, rows, 'bbox')
    scores, hits = scores_of(evaluator, truth), hits_of(evaluator)
    named = [each for each in scores.classes if each.objects]
    return Comparison(
        scores,
        _bins(hits),
        {
            each.name: (*best_f1(found), each.objects)
            for each, found in zip(named, hits, strict=True)
        },
        len(labelled),
        total - len(labelled),
        [name for name in names if matches[name] is None],
    )


def _restricted(
    truth: dict[str, Any], images: set[Any], kinds: set[Any]
) -> dict[str, Any]:
    return dict(
        truth,
        images=[row for row in truth['images'] if row['id'] in images],
        categories=[r for r in truth['categories'] if r['id'] in kinds],
        annotations=[
            row
            for row in truth['annotations']
            if row['image_id'] in images and row['category_id'] in kinds
        ],
    )


def _bins(classes: Sequence[ClassHits]) -> list[tuple[int, float, float]]:
    """Return the number, mean score and share that is right of each bin."""
    if not classes:
        return [(0, 0.0, 0.0)] * BINS
    scores = np.concatenate([hits.scores for hits in classes])
    right = np.concatenate([hits.right[0] for hits in classes])
    counted = right | np.concatenate([hits.wrong[0] for hits in classes])
    scores, right = scores[counted], right[counted]
    place = np.minimum((scores * BINS).astype(int), BINS - 1)
    found = []
    for number in range(BINS):
        inside = place == number
        count = int(inside.sum())
        means = (
            (scores[inside].mean(), right[inside].mean()) if count else (0, 0)
        )
        found.append((count, float(means[0]), float(means[1])))
    return found


def best_f1(hits: ClassHits) -> tuple[float, float]:
    """Return the score from which on boxes give the best F1, and that F1.

    F1 is twice the objects found by the number of objects and boxes, at an
    IoU of .50. Without a box that finds an object, the score is 1.
    """
    right, counted = hits.right[0], hits.right[0] | hits.wrong[0]
    f1 = 2 * np.cumsum(right) / (np.cumsum(counted) + hits.objects.sum())
    # Boxes of one score come or go together.
    last = np.append(np.diff(hits.scores) != 0, True)[: len(f1)]
    f1 = np.where(last, f1, 0.0)
    if not f1.any():
        return 1.0, 0.0
    best = int(f1.argmax())
    return float(hits.scores[best]), float(f1[best])
