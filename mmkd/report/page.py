"""Write a page about trainings: scores, curves, pictures and setup.

Examples:
    mmkd report work_dirs/demo/{student,distilled,teacher}
    mmkd report work_dirs/my_distilled --images 8 --out report.html

The command reads the logs of each work dir, evaluates its last checkpoint on
the test data of the first one's config, and writes a single HTML file that
opens from disk without a network. A frozen teacher whose work dir is not
given is evaluated too, on the images as its student sees them. With several
work dirs, the pictures are those on which the second one is most behind and
most ahead of the first: give the student first, then the distilled student,
then the teacher.
"""

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mmkd.errors import DataError

from .attention import attend
from .eval_coco import Scores, difference
from .evaluation import DRAWN, Evaluation, Picture, evaluate_runs, rank
from .figures import CUT, Line, bars, curves, heat, panels, photo
from .work_dir import WorkDir, read_work_dirs

SIZES = {'APs': 'small', 'APm': 'medium', 'APl': 'large'}
AP = '{:.2f}'
"""How average precisions are shown, in per cent."""

Row = Sequence[str | float | None]


@dataclass
class Table:
    """A table; a value of None is shown as a dash and sorted to the end.

    Attributes:
        columns: The headings, each with the format of its values.
        rows: Texts and numbers.
    """

    columns: Sequence[tuple[str, str]]
    rows: Sequence[Row]


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
        help='the work dir of a training',
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
        help='evaluate only on the first N images of the test data',
    )
    args = parser.parse_args(argv)
    if args.images < 0 or (args.evaluate is not None and args.evaluate < 1):
        parser.error('--images takes a number from 0, --eval from 1')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    out = args.out or args.work_dirs[0] / 'report.html'
    try:
        runs = read_work_dirs(args.work_dirs)
        evaluation = evaluate_runs(runs, args.evaluate)
        page = render(runs, evaluation, args.images)
        out.write_text(page, encoding='utf-8')
    except OSError as error:
        raise DataError(f'{error}') from error
    print(f'{out} ({len(page.encode()) / 2**20:.1f} MiB)')


def render(
    runs: Sequence[WorkDir], evaluation: Evaluation, images: int
) -> str:
    """Return the page as HTML."""
    names = [run.name for run in runs]
    scores = evaluation.scores
    chosen = choose(rank(evaluation.pictures, names), images)
    pictures = [
        describe(i, *item, list(scores), gain=len(runs) > 1)
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
        classes=class_table(scores, names),
        size_chart=size_chart(scores),
        sizes=size_table(scores, names),
        telemetry=[chart for chart in telemetry(runs) if chart],
        ranking=ranking(names),
        score=DRAWN,
        cut=CUT,
        pictures=pictures,
        attention=attentions(runs, evaluation, pictures),
        attention_notes=evaluation.notes,
        cost=cost_table(runs),
        setup=runs,
    )


# ------------------------------------------------------------------- tables


def percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def result_table(evaluation: Evaluation) -> Table:
    figures = ('AP', 'AP50', 'AP75', 'AR100')
    columns = [('run', '{}'), *((key, AP) for key in figures)]
    return Table(
        [*columns, ('parameters', '{:.2f} M')],
        [
            [
                name,
                *(percent(scores.figures[key]) for key in figures),
                evaluation.parameters[name] / 1e6,
            ]
            for name, scores in evaluation.scores.items()
        ],
    )


def compared(
    columns: Sequence[str],
    rows: Iterable[tuple[Row, Sequence[float | None]]],
    detectors: Iterable[str],
    runs: Sequence[str],
) -> Table:
    """Make a table of average precisions with a column per detector.

    Args:
        columns: The headings of the first columns.
        rows: Their values, and the average precision of each detector.
        detectors: The names of the detectors.
        runs: The names of those that are runs. From two on, the gain of the
            second over the first has a column too.
    """
    formats = [(name, '{}') for name in columns]
    formats += [(name, AP) for name in detectors]
    if len(runs) > 1:
        formats.append((f'{runs[1]} - {runs[0]}', '{:+.2f}'))
        rows = [(a, [*b, difference(b[1], b[0])]) for a, b in rows]
    return Table(formats, [[*a, *map(percent, b)] for a, b in rows])


def class_table(scores: Mapping[str, Scores], runs: Sequence[str]) -> Table:
    rows = [
        ([classes[0].name, classes[0].objects], [each.AP for each in classes])
        for classes in zip(*(s.classes for s in scores.values()), strict=True)
    ]
    return compared(['class', 'objects'], rows, scores, runs)


def size_table(scores: Mapping[str, Scores], runs: Sequence[str]) -> Table:
    rows = [
        ([size], [each.figures[key] for each in scores.values()])
        for key, size in SIZES.items()
    ]
    return compared(['objects'], rows, scores, runs)


def cost_table(runs: Sequence[WorkDir]) -> Table:
    columns = [
        ('run', '{}'),
        ('iterations', '{}'),
        ('s per iteration', '{:.3f}'),
        ('s of it for data', '{:.3f}'),
        ('GPU memory, MiB', '{:.0f}'),
        ('checkpoint, MiB', '{:.1f}'),
    ]
    rows: list[Row] = []
    for run in runs:
        seconds, data, memory = (
            run.logged.get(key, {}).values()
            for key in ('time', 'data_time', 'memory')
        )
        rows.append(
            [
                run.name,
                max(run.logged['loss']),
                statistics.median(seconds) if seconds else None,
                statistics.median(data) if data else None,
                max(memory, default=None),
                Path(run.checkpoint).stat().st_size / 2**20,
            ]
        )
    return Table(columns, rows)


# ------------------------------------------------------------------- charts


def charts(runs: Sequence[WorkDir]) -> list[str]:
    aps = {
        name: {step: 100 * ap for step, ap in line.items()}
        for run in runs
        for name, line in ap_lines(run).items()
    }
    losses = {run.name: run.logged['loss'] for run in runs}
    step = 'epoch' if runs[0].by_epoch else 'iteration'
    return [
        curves(aps, step, 'AP in validation, %'),
        curves(losses, 'iteration', 'training loss'),
        *(
            curves(run.loss_parts, 'iteration', f'losses of {run.name}')
            for run in runs
            if run.distils
        ),
    ]


def ap_lines(run: WorkDir) -> dict[str, Line]:
    """Name the curves of the student and of what trained beside it."""
    return {
        f'{run.name}: {network}' if network else run.name: line
        for network, line in run.aps.items()
    }


def size_chart(scores: Mapping[str, Scores]) -> str:
    heights = {
        name: {size: percent(each.figures[key]) for key, size in SIZES.items()}
        for name, each in scores.items()
    }
    return bars(heights, 'AP, %')


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
    """Choose the worst and the best, each picture once."""
    worst = [('worst', *pair) for pair in ranked[:count]]
    rest = ranked[len(worst) :]
    best = [('best', *pair) for pair in rest[::-1][:count]]
    return worst + best


def ranking(names: Sequence[str]) -> str:
    score = 'their AP50'
    if len(names) > 1:
        score = f'the lead of {names[1]} over {names[0]} in AP50'
    return f'These are the worst and the best by {score} on the picture alone.'


def describe(
    position: int,
    label: str,
    score: float,
    picture: Picture,
    detectors: Sequence[str],
    *,
    gain: bool,
) -> dict[str, Any]:
    """Return what the page needs of a picture; its score may be a gain."""
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
    """Return maps for every run that has a teacher to show."""
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
