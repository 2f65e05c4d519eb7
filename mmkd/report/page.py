"""One page about one or several trainings: scores, curves, pictures, setup.

Examples:
    mmkd report work_dirs/demo/{student,distilled,teacher}
    mmkd report work_dirs/my_distilled --images 8 --out report.html

Reads the logs of each work dir, evaluates its last checkpoint on the test
data of the first one's config, and writes a single HTML file that opens from
disk without a network. A frozen teacher whose work dir is not given is
evaluated, too, on the images as its student is shown them. With several work
dirs the pictures are those on which the second is most behind and ahead of
the first: give the student first, then the distilled one, then the teacher.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mmkd.errors import CheckpointError, ConfigError, DataError

from .attention import attend
from .eval_coco import Scores, difference, percent
from .evaluation import Evaluation, Picture, evaluate_runs, rank
from .figures import CUT, bars, curves, heat, panels, photo
from .summary import SCORE
from .work_dir import WorkDir, read_work_dirs

SIZES = {'APs': 'small', 'APm': 'medium', 'APl': 'large'}


@dataclass
class Cell:
    """Of a table: what is shown, and the number it is sorted by."""

    text: str
    value: float | None = None


@dataclass
class Table:
    """Headings and rows of cells."""

    header: list[str]
    rows: list[list[Cell]]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='mmkd report',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'work_dirs',
        nargs='+',
        type=lambda path: Path(path).resolve(),
        metavar='WORK_DIR',
        help='of trainings',
    )
    parser.add_argument(
        '--out',
        type=lambda path: Path(path).resolve(),
        help='the page (default: report.html in the first work dir)',
    )
    parser.add_argument(
        '--images',
        type=int,
        default=4,
        metavar='N',
        help='show the N worst and the N best images (default: %(default)s)',
    )
    parser.add_argument(
        '--eval',
        '--evaluate',
        dest='evaluate',
        type=int,
        metavar='N',
        help='evaluate on the first N images of the test data alone',
    )
    args = parser.parse_args(argv)
    if args.images < 0 or (args.evaluate is not None and args.evaluate < 1):
        parser.error('--images takes a number from 0, --eval from 1')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        runs = read_work_dirs(args.work_dirs)
        evaluation = evaluate_runs(runs, args.evaluate)
        page = render(runs, evaluation, args.images)
        out = args.out or args.work_dirs[0] / 'report.html'
        out.write_text(page, encoding='utf-8')
    except (CheckpointError, ConfigError, DataError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    print(f'{out} ({len(page.encode()) / 2**20:.1f} MiB)')
    return 0


def render(
    runs: Sequence[WorkDir], evaluation: Evaluation, images: int
) -> str:
    """The page."""
    names = [run.name for run in runs]
    detectors = list(evaluation.scores)
    chosen = choose(rank(evaluation.pictures, names), images)
    pictures = [
        describe(i, *item, detectors, gain=len(runs) > 1)
        for i, item in enumerate(chosen)
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template('page.html.j2').render(
        title=' | '.join(names),
        subtitle=f'{len(evaluation.pictures)} images; written '
        f'{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}',
        results=result_table(evaluation),
        charts=[chart for chart in charts(runs) if chart],
        classes=class_table(evaluation.scores, names),
        size_chart=bars(
            {
                name: {
                    size: scaled(scores.figures[key])
                    for key, size in SIZES.items()
                }
                for name, scores in evaluation.scores.items()
            },
            'AP, %',
        ),
        sizes=size_table(evaluation.scores, names),
        telemetry=[chart for chart in telemetry(runs) if chart],
        ranking=ranking(names),
        score=SCORE,
        cut=CUT,
        pictures=pictures,
        attention=attentions(runs, evaluation, pictures),
        attention_notes=evaluation.notes,
        cost=cost_table(runs),
        setup=runs,
    )


# ------------------------------------------------------------------- tables


def cell(value: float | None, sign: str = '') -> Cell:
    """A fraction in per cent."""
    return Cell('–' if value is None else percent(value, sign), value)


def scaled(value: float | None) -> float | None:
    return None if value is None else 100 * value


def with_gain(
    values: Sequence[float | None], runs: Sequence[str]
) -> list[Cell]:
    """The detectors' values and, of two or more runs, the second's gain."""
    cells = [cell(value) for value in values]
    if len(runs) > 1:
        cells.append(cell(difference(values[1], values[0]), '+'))
    return cells


def gain_heading(runs: Sequence[str]) -> list[str]:
    return [f'{runs[1]} - {runs[0]}'] if len(runs) > 1 else []


def result_table(evaluation: Evaluation) -> Table:
    figures = ('AP', 'AP50', 'AP75', 'AR100')
    rows = []
    for name, scores in evaluation.scores.items():
        millions = evaluation.parameters[name] / 1e6
        rows.append(
            [
                Cell(name),
                *(cell(scores.figures[key]) for key in figures),
                Cell(f'{millions:.2f} M', millions),
            ]
        )
    return Table(['run', *figures, 'parameters'], rows)


def class_table(scores: Mapping[str, Scores], runs: Sequence[str]) -> Table:
    rows = []
    for classes in zip(*(s.classes for s in scores.values()), strict=True):
        count = classes[0].objects
        rows.append(
            [
                Cell(classes[0].name),
                Cell(str(count), count),
                *with_gain([c.AP for c in classes], runs),
            ]
        )
    return Table(['class', 'objects', *scores, *gain_heading(runs)], rows)


def size_table(scores: Mapping[str, Scores], runs: Sequence[str]) -> Table:
    rows = []
    for key, size in SIZES.items():
        values = [found.figures[key] for found in scores.values()]
        rows.append([Cell(size), *with_gain(values, runs)])
    return Table(['objects', *scores, *gain_heading(runs)], rows)


def cost_table(runs: Sequence[WorkDir]) -> Table:
    header = ['run', 'iterations', 's an iteration', 's of it for data']
    header += ['GPU memory, MiB', 'checkpoint, MiB']
    rows = []
    for run in runs:
        cost = run.cost
        size = Path(run.checkpoint).stat().st_size / 2**20
        rows.append(
            [
                Cell(run.name),
                Cell(str(cost.iterations), cost.iterations),
                number(cost.seconds, '.3f'),
                number(cost.data_seconds, '.3f'),
                number(cost.memory_mib, '.0f'),
                number(size, '.1f'),
            ]
        )
    return Table(header, rows)


def number(value: float | None, form: str) -> Cell:
    return Cell('–' if value is None else f'{value:{form}}', value)


# ------------------------------------------------------------------- charts


def charts(runs: Sequence[WorkDir]) -> list[str]:
    aps = {
        name: {step: 100 * ap for step, ap in line.items()}
        for run in runs
        for name, line in ap_lines(run).items()
    }
    losses = {run.name: run.curves.loss for run in runs}
    step = 'epoch' if runs[0].by_epoch else 'iteration'
    return [
        curves(aps, step, 'AP in validation, %'),
        curves(losses, 'iteration', 'training loss'),
        *(
            curves(run.parts, 'iteration', f'losses of {run.name}')
            for run in runs
            if run.distils
        ),
    ]


def ap_lines(run: WorkDir) -> dict[str, dict[int, float]]:
    """Of its student, and of what was validated beside it."""
    others = run.curves.others.items()
    beside = {f'{run.name}: {name}': line for name, line in others}
    return {run.name: run.curves.ap, **beside}


def telemetry(runs: Sequence[WorkDir]) -> list[str]:
    return [
        curves(
            run.telemetry, 'iteration', f'cosine of {run.name}', (-1.05, 1.05)
        )
        for run in runs
    ]


# ----------------------------------------------------------------- pictures


def choose(
    ranked: Sequence[tuple[float, Picture]], count: int
) -> list[tuple[str, float, Picture]]:
    """The worst and the best, each picture once."""
    worst = [('worst', *pair) for pair in ranked[:count]]
    rest = ranked[len(worst) :]
    best = [('best', *pair) for pair in rest[::-1][:count]]
    return worst + best


def ranking(names: Sequence[str]) -> str:
    if len(names) == 1:
        return 'Worst and best by the AP50 on that picture alone.'
    return (
        f'Worst and best by how much {names[1]} is ahead of {names[0]} in '
        'the AP50 on that picture alone.'
    )


def describe(
    position: int,
    label: str,
    score: float,
    picture: Picture,
    detectors: Sequence[str],
    *,
    gain: bool,
) -> dict[str, Any]:
    """What the page needs of a picture; its score may be a gain."""
    uri, height, width = photo(picture)
    sign = '+' if gain else ''
    return {
        'id': picture.id,
        'key': f'photo-{position}',
        'label': label,
        'name': picture.path.name,
        'score': f'AP50 {100 * score:{sign}.0f}',
        'uri': uri,
        'height': height,
        'width': width,
        'panels': panels(picture, detectors),
    }


def attentions(
    runs: Sequence[WorkDir],
    evaluation: Evaluation,
    pictures: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Maps for every run whose teacher there is."""
    drawn: list[dict[str, Any]] = []
    for run in runs:
        if run.name not in evaluation.teachers or not pictures:
            continue
        teacher = evaluation.teachers[run.name]
        found = attend(run, teacher, [picture['id'] for picture in pictures])
        drawn += [
            {
                **picture,
                'run': run.name,
                'elsewhere': f'{100 * found[picture["id"]].elsewhere:.0f} %',
                'layers': heat(found[picture['id']]),
            }
            for picture in pictures
        ]
    return drawn
