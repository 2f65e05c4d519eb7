r"""Evaluate detections by COCO's twelve figures, and compare two of them.

Examples:
    mmkd eval work_dirs/x/x.bbox.json \
        data/coco/annotations/instances_val2017.json --per-class
    mmkd eval student.bbox.json ANNOTATIONS.json \
        --baseline plain.bbox.json --json report.json

Detections are a list of `{image_id, category_id, bbox: [x, y, width, height],
score}`, in pixels, as `mmkd test ... --json-prefix work_dirs/x/x` writes
them; for `--type segm`, `segmentation` takes the place of `bbox`. Figures are
printed in per cent, and written as fractions with `--json`.
"""

import argparse
import contextlib
import io
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmkd.data import check_coco_annotations, data_error, read_json, write_json
from mmkd.data.coco import SHAPES, problem_of
from mmkd.data.errors import some
from mmkd.data.files import shown
from mmkd.data.masks import mask_problem

from .tables import table

FIGURES = {
    'AP': 'IoU .50:.95',
    'AP50': 'IoU .50',
    'AP75': 'IoU .75',
    'APs': 'IoU .50:.95, area below 32²',
    'APm': 'IoU .50:.95, area 32² to 96²',
    'APl': 'IoU .50:.95, area above 96²',
    'AR1': 'IoU .50:.95, 1 box per image',
    'AR10': 'IoU .50:.95, 10 boxes per image',
    'AR100': 'IoU .50:.95, 100 boxes per image',
    'ARs': 'IoU .50:.95, area below 32²',
    'ARm': 'IoU .50:.95, area 32² to 96²',
    'ARl': 'IoU .50:.95, area above 96²',
}
"""In the order of ``COCOeval.stats``; average precisions, then recalls."""

SIGNS = {'result': '', 'baseline': '', 'difference': '+'}
"""The columns, and how their numbers are signed."""
REMEDY = (
    'Give what `mmkd test --json-prefix` wrote, and the annotations of the '
    'set that was tested.'
)


@dataclass
class ClassScore:
    """Figures of one class; ``objects`` counts those that are no crowd."""

    name: str
    objects: int
    AP: float | None
    AP50: float | None


@dataclass
class Scores:
    """Figures from 0 to 1; ``None`` where there is no object to detect."""

    figures: dict[str, float | None]
    classes: list[ClassScore]


# ------------------------------------------------------------------- files


def load_truth(path: Path, kind: str) -> dict[str, Any]:
    """Read annotations.

    Raises:
        DataError: As in :func:`mmkd.data.check_coco_annotations`, or an
            annotation lacks a mask that ``kind='segm'`` needs.
    """
    check_coco_annotations(path)
    truth: dict[str, Any] = read_json(path)
    rows = truth['annotations']
    for row in rows:
        if row.setdefault('iscrowd', 0) not in (0, 1):
            where = f'{path}: annotation {row["id"]}'
            got = shown(row['iscrowd'])
            raise data_error(where, 'iscrowd of 0 or 1', got, REMEDY)
        row['iscrowd'] = int(row['iscrowd'])
        row.pop('ignore', None)  # pycocotools puts iscrowd in its place
    for key in ('images', 'categories'):
        kinds = {type(row['id']) for row in truth[key]}
        if len(kinds) > 1:  # pycocotools would compare "1" with 1
            expected, got = 'ids that are all numbers, or all texts', 'both'
            raise data_error(f'{path}: {key}', expected, got, REMEDY)
    if any(isinstance(row['id'], str) for row in rows):
        for number, row in enumerate(rows, 1):  # as pycocotools counts them
            row['id'] = number
    if any(row['id'] == 0 for row in rows):
        warn(
            f'{path}: pycocotools takes annotation id 0 for "no match", '
            'so its detection counts as wrong; number them from 1'
        )
    lacking = sum(not row.get('segmentation') for row in rows)
    if kind == 'segm' and lacking:
        got = f'{lacking} without one'
        raise data_error(
            path, 'annotations with masks', got, 'Use --type bbox.'
        )
    if kind == 'segm':
        sizes = sizes_of(truth)
        for row in rows:
            size = sizes[row['image_id']]
            if problem := mask_problem(row['segmentation'], *size):
                where = f'{path}: annotation {row["id"]}'
                raise data_error(where, 'a mask', problem, REMEDY)
    return truth


def sizes_of(truth: dict[str, Any]) -> dict[Any, list[int]]:
    """Return the height and width of each image."""
    return {
        row['id']: [int(row['height']), int(row['width'])]
        for row in truth['images']
    }


def load_results(
    path: Path, truth: dict[str, Any], kind: str
) -> list[dict[str, Any]]:
    """Read detections.

    Raises:
        DataError: The file is missing, malformed or no list of detections
            of this kind, or names an image or a category that ``truth``
            lacks, or a mask has another size than its image.
    """
    results = read_json(path, remedy=REMEDY)
    if not isinstance(results, list):
        got = f'a {type(results).__name__}'
        if isinstance(results, dict) and 'annotations' in results:
            got = 'annotations'
        raise data_error(path, 'a list of detections', got, REMEDY)
    sizes = sizes_of(truth)
    for position, row in enumerate(results):
        if problem := problem_of(row, kind, sizes):
            where = f'{path}: entry {position}'
            expected = f'a detection of --type {kind}'
            raise data_error(where, expected, problem, REMEDY)
    for key, rows in (('image_id', 'images'), ('category_id', 'categories')):
        ids = {row['id'] for row in truth[rows]}
        lost = [row[key] for row in results if row[key] not in ids]
        if lost:
            names = some(map(repr, dict.fromkeys(lost)))
            got = f'{len(lost)} that name others: {names}'
            expected = f'detections of the {rows} in the annotations'
            raise data_error(path, expected, got, REMEDY)
    if not results:
        warn(f'{path}: no detection at all')
    # pycocotools would take the area of a box that stands beside a mask
    keys = ('image_id', 'category_id', 'score', SHAPES[kind])
    return [{key: row[key] for key in keys} for row in results]


def warn(text: str) -> None:
    print(f'warning: {text}', file=sys.stderr)


# ----------------------------------------------------------------- figures


def evaluate(
    truth: dict[str, Any],
    results: list[dict[str, Any]],
    kind: str,
    images: int | None = None,
) -> Scores:
    """Compute the figures of one set of detections with pycocotools.

    Args:
        truth: Annotations, see :func:`load_truth`.
        results: Detections, see :func:`load_results`.
        kind: ``bbox`` or ``segm``.
        images: Evaluate on this many images only, the first ones.
    """
    evaluator = evaluation_of(truth, results, kind, images)
    return scores_of(evaluator, truth)


def evaluation_of(
    truth: dict[str, Any],
    results: list[dict[str, Any]],
    kind: str,
    images: int | None = None,
) -> COCOeval:
    """Let pycocotools evaluate; the arguments are those of :func:`evaluate`.

    What it has matched is in its ``evalImgs``.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        objects = to_coco(truth)
        if results:
            found = objects.loadRes(results)
        else:  # loadRes does not take an empty list
            found = to_coco({**truth, 'annotations': []})
        evaluator = COCOeval(objects, found, iouType=kind)
        evaluator.params.imgIds = [row['id'] for row in truth['images']]
        evaluator.params.imgIds = evaluator.params.imgIds[:images]
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def scores_of(evaluator: COCOeval, truth: dict[str, Any]) -> Scores:
    """Read the figures of what pycocotools has evaluated."""
    figures = {
        name: average(value)
        for name, value in zip(FIGURES, evaluator.stats[:, None], strict=True)
    }
    among = set(evaluator.params.imgIds)
    counts = Counter(
        row['category_id']
        for row in truth['annotations']
        if row['image_id'] in among and not row['iscrowd']
    )
    names = {row['id']: row['name'] for row in truth['categories']}
    # IoU thresholds, recalls, classes; all areas, 100 detections per image
    precision = evaluator.eval['precision'][..., 0, -1]
    classes = [
        ClassScore(
            names[number],
            counts[number],
            average(precision[:, :, column]),
            average(precision[0, :, column]),
        )
        for column, number in enumerate(evaluator.params.catIds)
    ]
    return Scores(figures, classes)


def to_coco(dataset: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def average(values: np.ndarray) -> float | None:
    """Average what is known; COCO's -1 says that there is no object."""
    known = values[values > -1]
    return float(known.mean()) if known.size else None


def difference(new: float | None, old: float | None) -> float | None:
    return None if new is None or old is None else new - old


def compare(new: Scores, old: Scores) -> Scores:
    """The differences, per figure and per class."""
    return Scores(
        {
            name: difference(new.figures[name], old.figures[name])
            for name in FIGURES
        },
        [
            ClassScore(
                a.name,
                a.objects,
                difference(a.AP, b.AP),
                difference(a.AP50, b.AP50),
            )
            for a, b in zip(new.classes, old.classes, strict=True)
        ],
    )


def percent(value: float | None, sign: str = '') -> str:
    return '-' if value is None else f'{100 * value:{sign}.2f}'


# ------------------------------------------------------------------ tables


def figure_table(columns: Mapping[str, Scores]) -> str:
    rows = [
        [
            f'{name:6}{meaning}',
            *(
                percent(scores.figures[name], SIGNS[label])
                for label, scores in columns.items()
            ),
        ]
        for name, meaning in FIGURES.items()
    ]
    return table(['figure', *columns], rows, 'plain')


def class_table(columns: Mapping[str, Scores]) -> str:
    header, rows = ['class', 'objects'], []
    for figure in ('AP', 'AP50'):
        header += [figure, *list(columns)[1:]]
    for classes in zip(*(s.classes for s in columns.values()), strict=True):
        cells = [
            percent(getattr(row, figure), SIGNS[label])
            for figure in ('AP', 'AP50')
            for label, row in zip(columns, classes, strict=True)
        ]
        rows.append([classes[0].name, str(classes[0].objects), *cells])
    return table(header, rows, 'plain')


# ----------------------------------------------------------------- command


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='mmkd eval',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('result', type=Path, help='detections, JSON')
    parser.add_argument('annotations', type=Path, help='in COCO format')
    parser.add_argument(
        '--baseline', type=Path, help='detections to compare with'
    )
    parser.add_argument(
        '--type',
        choices=('bbox', 'segm'),
        default='bbox',
        help='what is compared (default: %(default)s)',
    )
    parser.add_argument(
        '--per-class', action='store_true', help='print AP of each class'
    )
    parser.add_argument(
        '--images',
        type=int,
        metavar='N',
        help='evaluate on the first N images of the annotations',
    )
    parser.add_argument(
        '--json', type=Path, metavar='OUT', help='write all of it to a file'
    )
    args = parser.parse_args(argv)
    if args.images is not None and args.images < 1:
        parser.error('--images takes a number from 1')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    truth = load_truth(args.annotations, args.type)
    paths = [args.result] + ([args.baseline] if args.baseline else [])
    # All are read before any is evaluated, so that errors come at once.
    loaded = [load_results(path, truth, args.type) for path in paths]
    scores = [evaluate(truth, rows, args.type, args.images) for rows in loaded]
    columns = dict(zip(SIGNS, scores, strict=False))
    if args.baseline:
        columns['difference'] = compare(*scores)
    total = len(truth['images'])
    for path, rows in zip(paths, loaded, strict=True):
        seen = len({row['image_id'] for row in rows})
        print(f'{path}: {len(rows)} detections on {seen} of {total} images')
    if args.images is not None:
        print(f'evaluated on the first {args.images} images')
    print('\n' + figure_table(columns))
    if args.per_class:
        print('\n' + class_table(columns))
    if args.json is not None:
        images = len(truth['images'][: args.images])
        found = {label: asdict(each) for label, each in columns.items()}
        write(args.json, {'type': args.type, 'images': images, **found})


def write(path: Path, report: dict[str, Any]) -> None:
    try:
        write_json(path, report)
    except OSError as error:
        remedy = 'Give another file with --json.'
        raise data_error(path, 'a writable file', f'{error}', remedy) from None
