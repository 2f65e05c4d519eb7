"""Write a page about trainings: a verdict, pictures, curves and setup.

Examples:
    mmkd report work_dirs/student work_dirs/pkd work_dirs/teacher
    mmkd report work_dirs/studies/my_study --out report.html
    mmkd report work_dirs/pkd --images 8 --score-thr 0.3

Give the plain student, the distilled student and the teacher, in any order:
the configs tell which is which. Several runs of one network that differ in
their seeds alone are taken together; the folder of a study stands for all of
its runs. The command evaluates the last checkpoint of each on the test data
of the first one's config, prints a verdict, and writes a single HTML file
that opens from disk without a network. A frozen teacher whose work dir is not
given is evaluated too, on the images as its student sees them.
"""

import argparse
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from mmkd.data.files import real_path, write_text
from mmkd.errors import ConfigError, DataError

from .attention import attend
from .eval_coco import ClassScore, Scores, difference
from .evaluation import Evaluation, Picture, best_score, evaluate_runs, rank
from .figures import (
    COLORS,
    CUT,
    DASHES,
    LABELLED,
    Line,
    bars,
    curves,
    heat,
    panels,
    photo,
)
from .judge import Speeds, judge
from .measure import measure
from .roles import Group, cast
from .summary import processor
from .tables import table
from .verdict import Verdict
from .work_dir import WorkDir, read_work_dirs

SIZES = {'APs': 'small', 'APm': 'medium', 'APl': 'large'}
AP = '{:.2f}'
"""How average precisions are shown, in per cent."""
PANELS = 5
"""The most networks that are shown on a photo."""
TIMED = 8
"""The number of images on which the speed is measured."""
OUTCOMES = {
    **{'gained': 'gain', 'harmed': 'harm', 'unshown': 'no gain shown'},
    **{'incomparable': 'not comparable', 'unknown': 'not known'},
}
"""The outcomes of verdicts in the page."""

Row = Sequence[str | float | None]


@dataclass
class Table:
    """A table; a value of None is shown as a dash and sorted to the end.

    Attributes:
        columns: The headings, each with the format of its values.
        rows: Texts and numbers.
        sorts: Whether a click on a heading sorts it.
    """

    columns: Sequence[tuple[str, str]]
    rows: Sequence[Row]
    sorts: bool = True


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='mmkd report',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'work_dirs',
        nargs='+',
        type=real_path,
        metavar='WORK_DIR',
        help='the work dir of a training, or of a study',
    )
    parser.add_argument(
        '--out',
        type=real_path,
        help='the page (default: report.html in the first work dir)',
    )
    parser.add_argument(
        '--images',
        type=int,
        default=3,
        metavar='N',
        help='show the N images on which most was gained, the N on which '
        'most was lost, and a typical one (default: %(default)s)',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        metavar='S',
        help='draw boxes from this score on (default: the one with which the '
        "network's F1 is best on all images)",
    )
    parser.add_argument(
        '--eval',
        '--evaluate',
        dest='evaluate',
        type=int,
        metavar='N',
        help='evaluate only on the first N images of the test data',
    )
    parser.add_argument(
        '--benchmark',
        type=float,
        default=20,
        metavar='SECONDS',
        help='how long to measure the speed of the networks; 0 measures '
        'nothing (default: %(default)s)',
    )
    args = parser.parse_args(argv)
    if args.images < 0 or (args.evaluate is not None and args.evaluate < 1):
        parser.error('--images takes a number from 0, --eval from 1')
    if args.score_thr is not None and not 0 <= args.score_thr <= 1:
        parser.error('--score-thr takes a score from 0 to 1')
    if not args.benchmark >= 0:
        parser.error('--benchmark takes seconds from 0')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    out = args.out or args.work_dirs[0] / 'report.html'
    try:
        runs = read_work_dirs(args.work_dirs)
        check_writable(out)
        groups = cast(runs)
        runs = [run for group in groups for run in group.runs]
        evaluation = evaluate_runs(runs, args.evaluate)
        speeds = speeds_of(groups, evaluation, args.benchmark)
        verdicts = judge(groups, evaluation, speeds)
        page = render(
            groups,
            evaluation,
            verdicts,
            speeds,
            images=args.images,
            score=args.score_thr,
        )
        write_text(out, page)
    except OSError as error:
        raise DataError(f'{error}') from error
    print(in_terminal(groups, evaluation, verdicts, speeds))
    print(f'\n{out} ({len(page.encode()) / 2**20:.1f} MiB)')


def check_writable(out: Path) -> None:
    """Say before the evaluation that a page cannot be written there.

    Raises:
        ConfigError: If it is a folder, or there is no folder to write to.
    """
    if out.is_dir():
        raise ConfigError(
            f'--out {out} is a folder. Give a file, such as {out}/report.html.'
        )
    if not os.access(out.parent, os.W_OK):
        why = 'is read-only' if out.parent.is_dir() else 'is no folder'
        raise ConfigError(
            f'the page {out} cannot be written: {out.parent} {why}. Give '
            'another file with --out.'
        )


def speeds_of(
    groups: Sequence[Group], evaluation: Evaluation, seconds: float
) -> Speeds:
    """Measure one run of each network, and teachers that are no runs."""
    if not seconds:
        return {}
    others = {
        name: evaluation.models[name]
        for names in evaluation.taught.values()
        for name in names
    }
    return measure(
        [group.first for group in groups],
        others=others,
        images=TIMED,
        seconds=seconds,
        device='cuda' if torch.cuda.is_available() else 'cpu',
    )


def in_terminal(
    groups: Sequence[Group],
    evaluation: Evaluation,
    verdicts: Sequence[Verdict],
    speeds: Speeds,
) -> str:
    """Return the verdicts and the figures of the networks as text."""
    figures = figure_table(groups, evaluation, speeds)
    rows = [
        ['-' if cell is None else str(cell) for cell in row]
        for row in figures.rows
    ]
    header = [name for name, _ in figures.columns]
    parts = [verdict.text() for verdict in verdicts]
    return '\n\n'.join(['', *parts, table(header, rows, 'plain')])


def render(
    groups: Sequence[Group],
    evaluation: Evaluation,
    verdicts: Sequence[Verdict],
    speeds: Speeds,
    *,
    images: int,
    score: float | None = None,
) -> str:
    """Return the page as HTML.

    Args:
        groups: The networks.
        evaluation: What they find.
        verdicts: See :func:`mmkd.report.judge.judge`.
        speeds: See :func:`speeds_of`.
        images: The number of pictures of each kind.
        score: Boxes of this score and higher ones are drawn; None draws them
            from the best F1 on.
    """
    runs = [run for group in groups for run in group.runs]
    pair = compared_pair(groups, verdicts)
    names = [group.name for group in pair]
    scores = averaged(groups, evaluation)
    scores = {name: scores[name] for name in names} | scores
    shown = on_photos(groups, evaluation, pair)
    thresholds = {
        key: best_score(evaluation.hits[key]) if score is None else score
        for key in shown
    }
    ranked = rank(
        evaluation.pictures, {g.first.name: thresholds[g.first.name]
                              for g in pair or groups[:1]}
    )  # fmt: skip
    pictures = [
        describe(number, *item, shown, thresholds, gain=bool(pair))
        for number, item in enumerate(choose(ranked, images, bool(pair)))
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters['code'] = as_code
    return environment.get_template('page.html.j2').render(
        title=' | '.join(group.name for group in groups),
        subtitle=f'{len(evaluation.pictures)} images; written '
        f'{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}',
        verdicts=verdicts,
        outcomes=OUTCOMES,
        results=figure_table(groups, evaluation, speeds),
        measured_on=device_name() if speeds else '',
        seeds=seed_table(groups, evaluation),
        metric=evaluation.metric,
        charts=[chart for chart in charts(runs) if chart],
        classes=class_table(scores, names),
        size_chart=size_chart(scores),
        sizes=size_table(scores, names),
        telemetry=[chart for chart in telemetry(runs) if chart],
        balance=[chart for chart in balance(runs) if chart],
        ranking=ranking(names),
        thresholds=told_scores(shown, thresholds, score),
        colors=COLORS,
        dashes=DASHES,
        labelled=LABELLED,
        classes_named=len(evaluation.truth['categories']) > 1,
        cut=CUT,
        pictures=pictures,
        attention=attentions(
            [group.first for group in groups], evaluation, pictures
        ),
        attention_notes=evaluation.notes,
        cost=cost_table(runs),
        setup=runs,
    )


def as_code(text: str) -> Markup:
    """Set what stands between backticks as code."""
    return Markup(re.sub('`(.*?)`', r'<code>\1</code>', str(escape(text))))


def compared_pair(
    groups: Sequence[Group], verdicts: Sequence[Verdict]
) -> list[Group]:
    """Return the two networks of the first verdict; none without a pair."""
    named = {group.name: group for group in groups}
    for verdict in verdicts:
        if verdict.plain in named and verdict.distilled in named:
            return [named[verdict.plain], named[verdict.distilled]]
    return []


def on_photos(
    groups: Sequence[Group], evaluation: Evaluation, pair: Sequence[Group]
) -> dict[str, str]:
    """Return the networks whose boxes are drawn: their keys and names."""
    first = {group.first.name: group.name for group in pair}
    all_runs = {run.name for group in groups for run in group.runs}
    teachers = {
        group.first.name: group.name
        for group in groups
        if group.role == 'teacher'
    }
    teachers |= {
        name: name for name in evaluation.scores if name not in all_runs
    }
    rest = {group.first.name: group.name for group in groups}
    chosen = list((first | teachers | rest).items())[:PANELS]
    last = [item for item in chosen if item[0] in teachers]
    return dict([item for item in chosen if item not in last] + last)


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f'one thread of {processor()}'


# ------------------------------------------------------------------- tables


def percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def spread(values: Sequence[float | None]) -> str | None:
    """Write a mean in per cent, with its deviation over several seeds."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return None
    text = f'{statistics.fmean(known):.1f}'
    return text + (
        f' ± {statistics.stdev(known):.1f}' if len(known) > 1 else ''
    )


def figure_table(
    groups: Sequence[Group], evaluation: Evaluation, speeds: Speeds
) -> Table:
    """The figures of each network, in a column each, as on a phone."""
    runs = {group.name: [run.name for run in group.runs] for group in groups}
    known = {name for names in runs.values() for name in names}
    runs |= {name: [name] for name in evaluation.scores if name not in known}
    rows: list[Row] = [
        [
            key,
            *(
                spread([evaluation.scores[run].figures[key] for run in each])
                for each in runs.values()
            ),
        ]
        for key in ('AP', 'AP50', 'AP75', 'AR100')
    ]
    firsts = [each[0] for each in runs.values()]
    rows.append(
        [
            'parameters',
            *(f'{evaluation.parameters[k] / 1e6:.2f} M' for k in firsts),
        ]
    )
    for title, key, form in (
        ('GFLOPs', 'gflops', '{:.2f}'),
        ('ms per image', 'ms', '{:.1f}'),
    ):
        values = [speeds.get(name, {}).get(key) for name in firsts]
        if any(values):
            rows.append([title, *(v and form.format(v) for v in values)])
    if any(len(each) > 1 for each in runs.values()):
        rows.append(['seeds', *(str(len(each)) for each in runs.values())])
    return Table([('', '{}'), *((name, '{}') for name in runs)], rows, False)


def seed_table(
    groups: Sequence[Group], evaluation: Evaluation
) -> Table | None:
    """The figures of each seed, if there are several of a network."""
    if all(len(group.runs) == 1 for group in groups):
        return None
    keys = ('AP', 'AP50', 'AP75')
    rows = [
        [
            group.name,
            run.seed,
            *(percent(evaluation.scores[run.name].figures[k]) for k in keys),
        ]
        for group in groups
        for run in group.runs
    ]
    columns = [('network', '{}'), ('seed', '{}'), *((k, AP) for k in keys)]
    return Table(columns, rows)


def averaged(
    groups: Sequence[Group], evaluation: Evaluation
) -> dict[str, Scores]:
    """Return the scores of each network, averaged over its seeds."""
    runs = {run.name for group in groups for run in group.runs}
    found = {
        group.name: mean([evaluation.scores[run.name] for run in group.runs])
        for group in groups
    }
    return found | {
        k: v for k, v in evaluation.scores.items() if k not in runs
    }


def mean(scores: Sequence[Scores]) -> Scores:
    def over(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    return Scores(
        {
            key: over(each.figures[key] for each in scores)
            for key in scores[0].figures
        },
        [
            ClassScore(
                rows[0].name,
                rows[0].objects,
                over(row.AP for row in rows),
                over(row.AP50 for row in rows),
            )
            for rows in zip(*(each.classes for each in scores), strict=True)
        ],
    )


def compared(
    heading: str,
    rows: Iterable[tuple[str, Sequence[float | None], Row]],
    detectors: Iterable[str],
    pair: Sequence[str],
    last: Sequence[str] = (),
) -> Table:
    """Make a table of average precisions with a column per detector.

    Args:
        heading: That of the first column.
        rows: Its value, the average precision of each detector, and the
            values of the last columns.
        detectors: The names of the detectors, those of the pair first.
        pair: The two that are compared, if any: the gain of the second over
            the first comes right after them, to be seen on a phone.
        last: The headings of the last columns.
    """
    formats = [(name, AP) for name in detectors]
    made = [(name, list(values), more) for name, values, more in rows]
    if pair:
        formats.insert(2, ('gain', '{:+.2f}'))
        for _, values, _ in made:
            values.insert(2, difference(values[1], values[0]))
    return Table(
        [(heading, '{}'), *formats, *((name, '{}') for name in last)],
        [[name, *map(percent, values), *more] for name, values, more in made],
    )


def class_table(scores: Mapping[str, Scores], pair: Sequence[str]) -> Table:
    rows = [
        (
            classes[0].name,
            [each.AP for each in classes],
            [classes[0].objects],
        )
        for classes in zip(*(s.classes for s in scores.values()), strict=True)
    ]
    return compared('class', rows, scores, pair, ['objects'])


def size_table(scores: Mapping[str, Scores], pair: Sequence[str]) -> Table:
    rows = [
        (size, [each.figures[key] for each in scores.values()], ())
        for key, size in SIZES.items()
    ]
    return compared('objects', rows, scores, pair)


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


def balance(runs: Sequence[WorkDir]) -> list[str]:
    """Draw what ``GradientBalanceHook`` has measured and set."""
    return [
        curves(
            {
                key.removeprefix('balance/').removesuffix(f'.{what}'): line
                for key, line in run.logged.items()
                if key.startswith('balance/') and key.endswith(f'.{what}')
            },
            'iteration',
            f'{label} of {run.name}',
            limits,
        )
        for run in runs
        for what, label, limits in (
            ('share', 'share of the gradient', (0, 1)),
            ('factor', 'factor of the weight', None),
        )
    ]


# ----------------------------------------------------------------- pictures


def choose(
    ranked: Sequence[tuple[float, Picture]], count: int, pair: bool
) -> list[tuple[str, float, Picture]]:
    """Choose what is most telling, each picture once.

    Args:
        ranked: See :func:`mmkd.report.evaluation.rank`.
        count: The number of pictures with the highest and with the lowest
            value. Then comes one of those in the middle.
        pair: Whether the values are gains, which have to be above or below 0.
    """
    if not count:
        return []
    high = [(v, p) for v, p in ranked[::-1] if not pair or v > 0][:count]
    rest = [(v, p) for v, p in ranked if all(p is not q for _, q in high)]
    low = [(v, p) for v, p in rest if not pair or v < 0][:count]
    chosen = {id(picture) for _, picture in high + low}
    middle = sorted(
        (abs(number - len(ranked) / 2), number)
        for number, (_, picture) in enumerate(ranked)
        if id(picture) not in chosen
    )
    typical = [ranked[number] for _, number in middle[:1]]
    labels = ('most gained', 'most lost') if pair else ('best', 'worst')
    return [
        *((labels[0], *each) for each in high),
        *((labels[1], *each) for each in low),
        *(('typical', *each) for each in typical),
    ]


def ranking(names: Sequence[str]) -> str:
    score = 'F1'
    if names:
        score = f'the lead of {names[1]} over {names[0]} in F1'
    return (
        f'These are the best and the worst images by {score}, counted in the '
        'boxes that are drawn, and one from the middle.'
    )


def told_scores(
    shown: Mapping[str, str],
    thresholds: Mapping[str, float],
    score: float | None,
) -> str:
    """Say from which score on boxes are drawn."""
    if score is not None:
        return f'Boxes of a score of {score:.2f} or more are drawn.'
    each = ', '.join(
        f'{name} {thresholds[key]:.2f}' for key, name in shown.items()
    )
    return (
        'Boxes are drawn from the score on with which F1 is best on all '
        f'images: {each}.'
    )


def describe(
    position: int,
    label: str,
    value: float,
    picture: Picture,
    shown: Mapping[str, str],
    thresholds: Mapping[str, float],
    *,
    gain: bool,
) -> dict[str, Any]:
    """Return what the page needs of a picture; its value may be a gain."""
    uri, height, width = photo(picture)
    sign = '+' if gain else ''
    drawn = panels(picture, list(shown), thresholds)
    for panel in drawn:
        panel.name = shown.get(panel.name, '')
    return {
        'id': picture.id,
        'key': f'photo-{position}',
        'label': label,
        'name': picture.path.name,
        'score': f'F1 {100 * value:{sign}.0f}',
        'uri': uri,
        'height': height,
        'width': width,
        'font': round(max(width, height * 0.75) / 28, 1),
        'panels': drawn,
        'labelled': all(len(panel.boxes) <= LABELLED for panel in drawn),
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
        if not found:
            continue
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
