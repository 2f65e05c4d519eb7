"""What the demo writes: a table, a verdict, curves and pictures."""

import contextlib
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.data.files import write_text
from mmkd.data.pictures import too_large
from mmkd.errors import PictureError

from .bootstrap import paired_bootstrap
from .evaluation import (
    Evaluation,
    Picture,
    best_score,
    evaluate_runs,
    match,
    rank,
)
from .figures import COLORS, Line, Panel, line_chart, panels, plt
from .measure import measure
from .tables import table
from .verdict import Network, Verdict, verdict
from .work_dir import WorkDir, read_work_dir

TITLES = {
    'student': 'before: the plain student',
    'distilled': 'after: the distilled student',
    'teacher': 'the teacher',
}
"""The networks in the order in which they are drawn."""


def write_results(
    folders: Mapping[str, Path], minutes: Mapping[str, float], folder: Path
) -> dict[str, Any]:
    """Evaluate trained networks; write table.md, the curves and pictures.

    Args:
        folders: The work dir of each network, by its name.
        minutes: The CPU time of each training.
        folder: Where to write.

    Returns:
        All that was measured, for table.json.
    """
    runs = {name: read_work_dir(path, name) for name, path in folders.items()}
    evaluation = evaluate_runs(list(runs.values()))
    speeds = measure(list(runs.values()))
    networks = {
        name: {
            **{key: scores.figures[key] for key in ('AP', 'AP50', 'AP75')},
            'parameters': evaluation.parameters[name],
            **speeds[name],
        }
        for name, scores in evaluation.scores.items()
    }
    tiles = evaluation.pictures
    trees = sum(len(tile.truth.boxes) for tile in tiles)
    seed = runs['student'].config.randomness.seed
    judged = judge(evaluation, networks, seed)
    text = [results_table(networks, minutes), notes(len(tiles), trees)]
    write_text(folder / 'table.md', '\n\n'.join(text) + '\n')
    draw_curves([runs[name] for name in TITLES], folder)
    scores = {name: best_score(evaluation.hits[name]) for name in networks}
    draw_tile(most_gained(tiles, scores), scores, folder / 'before_after.png')
    draw_pictures(tiles, scores, folder / 'pictures')
    return {
        'seed': seed,
        'tiles': len(tiles),
        'trees': trees,
        'processor': f'{os.cpu_count()} x {processor()}',
        'networks': networks,
        'drawn_from': scores,
        'verdict': judged.text(),
    }


def judge(
    evaluation: Evaluation,
    networks: Mapping[str, Mapping[str, Any]],
    seed: int,
) -> Verdict:
    """Compare the distilled student with the plain one."""
    plain, distilled, teacher = (
        Network(
            name,
            {seed: networks[name]['AP']},
            *(networks[name][key] for key in ('parameters', 'gflops', 'ms')),
        )
        for name in TITLES
    )
    hits = evaluation.hits
    images = paired_bootstrap([hits['student']], [hits['distilled']])
    return verdict(plain, distilled, teacher, images=images)


def processor() -> str:
    """Return the processor's name, where the system tells it."""
    with contextlib.suppress(OSError):
        text = Path('/proc/cpuinfo').read_text()
        if named := re.search(r'model name\s*: (.+)', text):
            return named[1]
    return platform.processor() or platform.machine()


def results_table(
    networks: Mapping[str, Mapping[str, Any]], minutes: Mapping[str, float]
) -> str:
    """Return a table in Markdown; average precisions are in per cent."""
    header = ['network', 'parameters', 'GFLOPs', 'ms per tile']
    header += ['AP', 'AP50', 'AP75', 'CPU min of training']
    rows = [
        [
            name,
            f'{row["parameters"] / 1e6:.2f} M',
            f'{row["gflops"]:.2f}',
            f'{row["ms"]:.0f}',
            *(f'{100 * row[key]:.1f}' for key in ('AP', 'AP50', 'AP75')),
            f'{minutes[name]:.1f}',
        ]
        for name, row in networks.items()
    ]
    return table(header, rows)


def notes(tiles: int, trees: int) -> str:
    """Say what the table's numbers are."""
    return (
        f'AP in per cent on {tiles} validation tiles with {trees} trees, by '
        'the last checkpoints. A multiply-add counts as one FLOP; ms is the '
        'median on one CPU thread.'
    )


def draw_curves(runs: Sequence[WorkDir], folder: Path) -> None:
    """Write loss.png and ap.png."""
    losses = {run.name: run.logged['loss'] for run in runs}
    figure = line_chart(losses, 'iteration', 'training loss')
    note = "The distilled student's loss includes that of distillation."
    figure.axes[0].set_title(note, fontsize=8)
    save(figure, folder / 'loss.png')
    aps: dict[str, Line] = {
        run.name: {epoch: 100 * ap for epoch, ap in run.aps[''].items()}
        for run in runs
    }
    figure = line_chart(aps, 'epoch', 'AP on the validation tiles, %')
    save(figure, folder / 'ap.png')


def most_gained(
    tiles: Sequence[Picture], scores: Mapping[str, float]
) -> Picture:
    """Return the tile with the largest gain in F1 by distillation.

    It is one on which the distilled student finds half of the trees, if there
    is any.
    """
    pair = {name: scores[name] for name in ('student', 'distilled')}
    telling = []
    for tile in tiles:
        found = tile.found['distilled'].above(scores['distilled'])
        _, seen = match(tile.truth, found)
        if len(seen) and 2 * seen.sum() >= len(seen):
            telling.append(tile)
    return rank(telling or tiles, pair)[-1][1]


def draw_pictures(
    tiles: Sequence[Picture],
    scores: Mapping[str, float],
    folder: Path,
    count: int = 6,
) -> None:
    """Draw every n-th tile."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob('*.png'):
        old.unlink()
    for tile in tiles[:: -(-len(tiles) // count)]:
        draw_tile(tile, scores, folder / f'{tile.path.stem}.png')


def draw_tile(tile: Picture, scores: Mapping[str, float], path: Path) -> None:
    """Draw the ground truth, and the boxes of every network from its score."""
    if problem := too_large(tile.path):
        raise PictureError(problem)
    names = [name for name in TITLES if name in tile.found]
    drawn = panels(tile, names, scores)
    figure, places = plt.subplots(
        1, len(drawn), figsize=(16, 4.6), layout='constrained'
    )
    for axes, panel in zip(places, drawn, strict=True):
        axes.imshow(plt.imread(tile.path), interpolation='bicubic')
        panel.name = TITLES.get(panel.name, '')
        draw_panel(axes, panel)
    figure.supxlabel(
        f'{tile.path.stem}   ·   A blue box finds a tree (IoU ≥ 0.5), an '
        'orange one does not; dotted yellow is a tree that was missed. Each '
        "network's boxes are drawn from the score on that gives its best F1 "
        'on all tiles.',
        fontsize=9,
        color='#555555',
    )
    save(figure, path)


def draw_panel(axes: plt.Axes, panel: Panel) -> None:
    axes.axis('off')
    axes.set_title('\n'.join(panel.title.rsplit(': ', 1)), fontsize=11)
    for box in panel.boxes:
        axes.add_patch(
            plt.Rectangle(
                (box.x, box.y),
                box.width,
                box.height,
                fill=False,
                linewidth=1.6,
                edgecolor=COLORS[box.kind],
                linestyle=':' if box.kind == 'missed' else '-',
            )
        )


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
