r"""Evaluate detections by COCO's twelve figures, and compare two of them.

    mmkd eval work_dirs/x/x.bbox.json \
        data/coco/annotations/instances_val2017.json --per-class
    mmkd eval student.bbox.json ANNOTATIONS.json \
        --baseline plain.bbox.json --json report.json

Detections are a list of `{image_id, category_id, bbox: [x, y, width, height],
score}`, in pixels, as `mmkd test` writes them with
`--cfg-options test_evaluator.outfile_prefix=work_dirs/x/x`; for
`--type segm`, `segmentation` takes the place of `bbox`. Figures are printed
in per cent, and written with `--json` as fractions.
"""

import argparse
import contextlib
import io
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmkd.data import check_coco_annotations, data_error, read_json, write_json
from mmkd.errors import DataError

FIGURES = {
    'AP': 'IoU .50:.95',
    'AP50': 'IoU .50',
    'AP75': 'IoU .75',
    'APs': 'IoU .50:.95, area below 32²',
    'APm': 'IoU .50:.95, area 32² to 96²',
    'APl': 'IoU .50:.95, area above 96²',
    'AR1': 'IoU .50:.95, 1 box an image',
    'AR10': 'IoU .50:.95, 10 boxes an image',
    'AR100': 'IoU .50:.95, 100 boxes an image',
    'ARs': 'IoU .50:.95, area below 32²',
    'ARm': 'IoU .50:.95, area 32² to 96²',
    'ARl': 'IoU .50:.95, area above 96²',
}
"""In the order of ``COCOeval.stats``; average precisions, then recalls."""

SHAPES = {'bbox': 'bbox', 'segm': 'segmentation'}


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


def load_truth(path: Path, kind: str) -> dict[str, Any]:
    """Read annotations.

    Raises:
        DataError: As in :func:`mmkd.data.check_coco_annotations`, or an
            annotation lacks a mask that ``kind='segm'`` needs.
    """
    check_coco_annotations(path)
    truth: dict[str, Any] = read_json(path)
    lacking = 0
    for row in truth['annotations']:
        row.setdefault('iscrowd', 0)
        lacking += not row.get('segmentation')
        if row['id'] == 0:
            warn(
                f'{path}: pycocotools takes annotation id 0 for "no match", '
                'so its detection counts as wrong; number them from 1'
            )
    if kind == 'segm' and lacking:
        got = f'{lacking} without one'
        remedy = 'Use --type bbox.'
        raise data_error(path, 'annotations with masks', got, remedy)
    return truth


def load_results(
    path: Path, truth: dict[str, Any], kind: str
) -> list[dict[str, Any]]:
    """Read detections.

    Raises:
        DataError: The file is missing, malformed or no list of detections
            of this kind, or names an image or a category that ``truth``
            lacks.
    """
    remedy = 'Write it anew with `mmkd test`.'
    results = read_json(path, remedy=remedy)
    if not isinstance(results, list):
        got = f'a {type(results).__name__}'
        if isinstance(results, dict) and 'annotations' in results:
            got = 'annotations'
        raise data_error(path, 'a list of detections', got, remedy)
    for position, row in enumerate(results):
        problem = result_problem(row, kind)
        if problem:
            where = f'{path}: entry {position}'
            expected = f'a detection of --type {kind}'
            raise data_error(where, expected, problem, remedy)
    for key, rows in (('image_id', 'images'), ('category_id', 'categories')):
        ids = {row['id'] for row in truth[rows]}
        lost = Counter(row[key] for row in results if row[key] not in ids)
        if lost:
            some = ', '.join(map(repr, list(lost)[:3]))
            more = f' and {len(lost) - 3} more' if len(lost) > 3 else ''
            got = f'{sum(lost.values())} that name others: {some}{more}'
            expected = f'detections of the {rows} in the annotations'
            remedy = 'Give the annotations of the set that was tested.'
            raise data_error(path, expected, got, remedy)
    if kind == 'segm':
        check_masks(path, results, truth['images'])
    if not results:
        warn(f'{path}: no detection at all')
    # with a box beside a mask, pycocotools takes the area of the box
    keys = ('image_id', 'category_id', 'score', SHAPES[kind])
    return [{key: row[key] for key in keys} for row in results]


def check_masks(
    path: Path, results: list[dict[str, Any]], images: list[dict[str, Any]]
) -> None:
    """Masks of another size than their image overlap with nothing."""
    sizes = {row['id']: [row['height'], row['width']] for row in images}
    for position, row in enumerate(results):
        expected = sizes[row['image_id']]
        found = row['segmentation'].get('size')
        if found != expected:
            where = f'{path}: entry {position}'
            remedy = 'Give the annotations of the set that was tested.'
            raise data_error(
                where, f'a mask of size {expected}', f'{found}', remedy
            )


def warn(text: str) -> None:
    print(f'warning: {text}', file=sys.stderr)


def result_problem(row: object, kind: str) -> str | None:
    """What is wrong with one entry of a result file."""
    if not isinstance(row, dict):
        return f'a {type(row).__name__}'
    for key in ('image_id', 'category_id', 'score', SHAPES[kind]):
        if key not in row:
            return f'no {key}, only {", ".join(row)}'
    for key in ('image_id', 'category_id'):
        if not isinstance(row[key], (int, str)):
            return f'{key}={row[key]!r}'
    numbers = [row['score']]
    if kind == 'bbox':
        if not isinstance(row['bbox'], list) or len(row['bbox']) != 4:
            return f'bbox={row["bbox"]!r}, which is not 4 numbers'
        numbers += row['bbox']
    elif not is_rle(row['segmentation']):
        return 'a segmentation that is no compressed RLE'
    for value in numbers:
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return f'{value!r} in its score or box'
    return None


def is_rle(mask: object) -> bool:
    return isinstance(mask, dict) and isinstance(mask.get('counts'), str)


def evaluate(
    truth: dict[str, Any],
    results: list[dict[str, Any]],
    kind: str,
    images: int | None = None,
) -> Scores:
    """The figures of one set of detections, computed by pycocotools.

    Args:
        truth: Annotations, see :func:`load_truth`.
        results: Detections, see :func:`load_results`.
        kind: ``bbox`` or ``segm``.
        images: Evaluate on the first so many images only.
    """
    chosen = [row['id'] for row in truth['images'][:images]]
    with contextlib.redirect_stdout(io.StringIO()):
        objects = to_coco(truth)
        if results:
            found = objects.loadRes(results)
        else:  # which loadRes does not take
            found = to_coco({**truth, 'annotations': []})
        evaluator = COCOeval(objects, found, iouType=kind)
        evaluator.params.imgIds = chosen
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    figures = {
        name: known(value)
        for name, value in zip(FIGURES, evaluator.stats, strict=True)
    }
    among = set(chosen)
    counts = Counter(
        row['category_id']
        for row in truth['annotations']
        if row['image_id'] in among and not row['iscrowd']
    )
    names = {row['id']: row['name'] for row in truth['categories']}
    # IoU thresholds, recalls, classes; of all areas and most detections
    precision = evaluator.eval['precision'][..., 0, -1]
    classes = [
        ClassScore(
            names[number],
            counts[number],
            mean(precision[:, :, column]),
            mean(precision[0, :, column]),
        )
        for column, number in enumerate(evaluator.params.catIds)
    ]
    return Scores(figures, classes)


def to_coco(dataset: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def mean(precision: np.ndarray) -> float | None:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else None


def known(value: float) -> float | None:
    """COCO's -1 says that there is no object to detect."""
    return float(value) if value > -1 else None


def difference(new: float | None, old: float | None) -> float | None:
    return None if new is None or old is None else new - old


def compare(new: Scores, old: Scores) -> dict[str, Any]:
    """Differences, per figure and per class."""
    return {
        'figures': {
            name: difference(new.figures[name], old.figures[name])
            for name in FIGURES
        },
        'classes': [
            {
                'name': a.name,
                'AP': difference(a.AP, b.AP),
                'AP50': difference(a.AP50, b.AP50),
            }
            for a, b in zip(new.classes, old.classes, strict=True)
        ],
    }


def percent(value: float | None, sign: str = '') -> str:
    return '-' if value is None else f'{100 * value:{sign}.2f}'


def versus(new: float | None, old: float | None) -> list[str]:
    return [percent(new), percent(old), percent(difference(new, old), '+')]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of text; the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return '\n'.join(
        '  '.join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(
                zip(line, widths, strict=True)
            )
        ).rstrip()
        for line in lines
    )


def figure_table(new: Scores, old: Scores | None) -> str:
    rows = []
    for name, meaning in FIGURES.items():
        value = new.figures[name]
        cells = (
            [percent(value)]
            if old is None
            else (versus(value, old.figures[name]))
        )
        rows.append([f'{name:6}{meaning}', *cells])
    columns = ['result'] if old is None else ['result', 'baseline', 'diff']
    return table(['figure', *columns], rows)


def class_table(new: Scores, old: Scores | None) -> str:
    rows = []
    for position, row in enumerate(new.classes):
        cells = [row.name, str(row.objects)]
        if old is None:
            cells += [percent(row.AP), percent(row.AP50)]
        else:
            base = old.classes[position]
            cells += versus(row.AP, base.AP) + versus(row.AP50, base.AP50)
        rows.append(cells)
    columns = ['AP', 'AP50']
    if old is not None:
        columns = [
            'AP', 'baseline', 'diff', 'AP50', 'baseline', 'diff',
        ]  # fmt: skip
    return table(['class', 'objects', *columns], rows)


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


def run(args: argparse.Namespace) -> None:
    truth = load_truth(args.annotations, args.type)
    paths = [args.result] + ([args.baseline] if args.baseline else [])
    # all are read before any is evaluated: an error is told at once
    loaded = [load_results(path, truth, args.type) for path in paths]
    covered = [len({row['image_id'] for row in rows}) for rows in loaded]
    scores = [evaluate(truth, rows, args.type, args.images) for rows in loaded]
    new, old = scores[0], scores[1] if args.baseline else None
    for path, rows, count in zip(paths, loaded, covered, strict=True):
        total = len(truth['images'])
        print(f'{path}: {len(rows)} detections on {count} of {total} images')
    if args.images is not None:
        print(f'evaluated on the first {args.images} images')
    print('\n' + figure_table(new, old))
    if args.per_class:
        print('\n' + class_table(new, old))
    if args.json is not None:
        report: dict[str, Any] = {
            'type': args.type,
            'images': len(truth['images'][: args.images]),
            'result': asdict(new),
        }
        if old is not None:
            report['baseline'] = asdict(old)
            report['difference'] = compare(new, old)
        write_json(args.json, report)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except DataError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    except OSError as error:
        where = f'{error.filename}: ' if error.filename else ''
        print(f'error: {where}{error.strerror or error}', file=sys.stderr)
        return 1
    return 0
