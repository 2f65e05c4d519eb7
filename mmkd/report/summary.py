"""What the demo writes: a table, curves and pictures."""

import contextlib
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .evaluation import DRAWN, Picture, evaluate_runs
from .figures import Line, Panel, line_chart, panels, plt
from .measure import measure
from .tables import table
from .work_dir import WorkDir, read_work_dir

COLORS = {
    **{'truth': 'white', 'right': '#7dff7a'},
    **{'wrong': '#ff4d4d', 'missed': '#ffd92f'},
}
"""The colour of a box by its kind."""
DRAWN_IN_ORDER = ('student', 'distilled', 'teacher')


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
    text = [results_table(networks, minutes), remarks(networks, tiles)]
    (folder / 'table.md').write_text('\n\n'.join(text) + '\n')
    draw_curves([runs[name] for name in DRAWN_IN_ORDER], folder)
    draw_pictures(tiles, folder / 'pictures')
    return {
        'seed': runs['student'].config.randomness.seed,
        'tiles': len(tiles),
        'trees': trees,
        'processor': f'{os.cpu_count()} x {processor()}',
        'networks': networks,
    }


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


def remarks(
    networks: Mapping[str, Mapping[str, Any]], tiles: Sequence[Picture]
) -> str:
    """Say what the table shows and what it cannot show."""
    gain = 100 * (networks['distilled']['AP'] - networks['student']['AP'])
    gain = round(gain, 1) + 0.0  # no -0.0
    trees = sum(len(tile.truth.boxes) for tile in tiles)
    return (
        f'Distilled - student: {gain:+.1f} AP. With only {len(tiles)} '
        f'validation tiles ({trees} trees) and one seed, the spread is wide: '
        'a difference of a few points may have the other sign with another '
        'seed.\n\n'
        'All numbers are those of the last checkpoints. AP is in per cent; a '
        'multiply-add counts as one FLOP; ms is the median on one CPU thread.'
    )


def draw_curves(runs: Sequence[WorkDir], folder: Path) -> None:
    """Write loss.png and ap.png."""
    losses = {run.name: run.logged['loss'] for run in runs}
    figure = line_chart(losses, 'iteration', 'training loss')
    note = (
        'It rises while more of the sampled boxes become trees.\n'
        "The distilled student's loss includes that of distillation."
    )
    figure.axes[0].set_title(note, fontsize=8)
    save(figure, folder / 'loss.png')
    aps: dict[str, Line] = {
        run.name: {epoch: 100 * ap for epoch, ap in run.aps[''].items()}
        for run in runs
    }
    figure = line_chart(aps, 'epoch', 'AP on the validation tiles, %')
    save(figure, folder / 'ap.png')


def draw_pictures(
    tiles: Sequence[Picture], folder: Path, count: int = 6
) -> None:
    """Draw every n-th tile: the truth, and the boxes of every network."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob('*.png'):
        old.unlink()
    for tile in tiles[:: -(-len(tiles) // count)]:
        names = [name for name in DRAWN_IN_ORDER if name in tile.found]
        drawn = panels(tile, names)
        figure, places = plt.subplots(
            1, len(drawn), figsize=(14, 4), layout='constrained'
        )
        for axes, panel in zip(places, drawn, strict=True):
            axes.imshow(plt.imread(tile.path), interpolation='bicubic')
            draw_panel(axes, panel)
        figure.supxlabel(
            f'{tile.path.stem}   ·   boxes of score ≥ {DRAWN}: a green one '
            'finds a tree (IoU ≥ 0.5), a red one does not; dotted yellow is '
            'a tree that was missed',
            fontsize=9,
            color='#555555',
        )
        save(figure, folder / f'{tile.path.stem}.png')


def draw_panel(axes: plt.Axes, panel: Panel) -> None:
    axes.axis('off')
    axes.set_title(panel.title)
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
