"""What the demo writes: a table, curves and pictures."""

import contextlib
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np

from .measure import Boxes, Detections, Figures, Tile, measure

matplotlib.use('Agg')
from matplotlib import pyplot as plt

from mmkd.engine.logs import main_metric, training_rows, validations

if TYPE_CHECKING:
    from mmkd.study.training import Network

COLORS = {'teacher': '#777777', 'student': '#0072b2', 'distilled': '#d55e00'}
RIGHT, WRONG, MISSED = '#7dff7a', '#ff4d4d', '#ffd92f'
SCORE = 0.5
"""Boxes of a lower score are not drawn."""


@dataclass
class Curves:
    """Loss by iteration and AP, from 0 to 1, by epoch.

    ``others``: the AP of networks that trained beside, and of ensembles.
    """

    loss: dict[int, float] = field(default_factory=dict)
    ap: dict[int, float] = field(default_factory=dict)
    others: dict[str, dict[int, float]] = field(default_factory=dict)


def write_results(
    networks: 'Mapping[str, Network]', folder: Path
) -> dict[str, Any]:
    """Measure trained networks; write table.md, the curves and pictures.

    Returns:
        All that is known of them, for table.json.
    """
    figures, tiles, detections = measure(
        {n.name: (n.config, n.checkpoint) for n in networks.values()}
    )
    states = {name: network.state for name, network in networks.items()}
    minutes = {n: state['cpu_seconds'] / 60 for n, state in states.items()}
    trees = sum(len(tile.trees) for tile in tiles)
    text = f'{table(figures, minutes)}\n\n{remarks(figures, tiles)}\n'
    (folder / 'table.md').write_text(text)
    plot_curves(
        {name: read_curves(n.folder) for name, n in networks.items()}, folder
    )
    order = ('student', 'distilled', 'teacher')
    found = {name: detections[name] for name in order}
    draw_pictures(tiles, found, folder / 'pictures')
    return {
        'seed': networks['student'].config.randomness.seed,
        'tiles': len(tiles),
        'trees': trees,
        'processor': f'{os.cpu_count()} x {processor()}',
        'networks': {
            name: {
                'command': ' '.join(['python', *network.command]),
                **states[name],
                **asdict(figures[name]),
            }
            for name, network in networks.items()
        },
    }


def processor() -> str:
    """Its name, where the system tells."""
    with contextlib.suppress(OSError):
        text = Path('/proc/cpuinfo').read_text()
        if named := re.search(r'model name\s*: (.+)', text):
            return named[1]
    return platform.processor() or platform.machine()


# ------------------------------------------------------------------- table


def table(
    figures: Mapping[str, Figures], cpu_minutes: Mapping[str, float]
) -> str:
    """A table in Markdown; average precisions in per cent."""
    header = ['network', 'parameters', 'GFLOPs', 'ms a tile']
    header += ['AP', 'AP50', 'AP75', 'CPU min of training']
    rows = [
        [
            name,
            f'{row.parameters / 1e6:.2f} M',
            f'{row.gflops:.2f}',
            f'{row.ms:.0f}',
            f'{100 * row.AP:.1f}',
            f'{100 * row.AP50:.1f}',
            f'{100 * row.AP75:.1f}',
            f'{cpu_minutes[name]:.1f}',
        ]
        for name, row in figures.items()
    ]
    return markdown(header, rows)


def remarks(figures: Mapping[str, Figures], tiles: Sequence[Tile]) -> str:
    """What the table says and what it cannot say."""
    gain = 100 * (figures['distilled'].AP - figures['student'].AP)
    gain = round(gain, 1) + 0.0  # no -0.0
    trees = sum(len(tile.trees) for tile in tiles)
    return (
        f'Distilled - student: {gain:+.1f} AP. With only {len(tiles)} '
        f'validation tiles ({trees} trees) and one seed the spread is wide: '
        'another seed may turn a difference of a few points around.\n\n'
        'Last checkpoints; AP in per cent; a multiply-add is one FLOP; ms: '
        'the median on one CPU thread.'
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first to the left, the others to the right."""
    first, *others = zip(header, *rows, strict=True)
    width = max(map(len, first))
    columns = [[first[0].ljust(width), '-' * width]]
    columns[0] += [cell.ljust(width) for cell in first[1:]]
    for column in others:
        width = max(map(len, column))
        cells = [cell.rjust(width) for cell in column]
        columns.append([cells[0], '-' * (width - 1) + ':', *cells[1:]])
    lines = zip(*columns, strict=True)
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


# ------------------------------------------------------------------ curves


def read_curves(folder: Path) -> Curves:
    """Read what MMEngine logged in a work dir."""
    rows = training_rows(folder)
    losses = {row['step']: row['loss'] for row in rows if 'loss' in row}
    curves = Curves(dict(sorted(losses.items())))
    for step, metrics in validations(folder).items():
        main = main_metric(metrics)
        for key, value in metrics.items():
            network = key.removesuffix(f'/{main}')
            if key == main:
                curves.ap[step] = value
            elif key != network:
                curves.others.setdefault(network, {})[step] = value
    return curves


def lower_limit(
    lines: Mapping[str, Mapping[int, float]],
) -> float | None:
    """Where an axis begins: at 0, unless that would hide values."""
    values = [value for line in lines.values() for value in line.values()]
    return None if any(value < 0 for value in values) else 0


def plot_curves(curves: Mapping[str, Curves], folder: Path) -> None:
    """Write loss.png and ap.png."""
    losses = {name: c.loss for name, c in curves.items()}
    note = (
        'It rises while more of the sampled boxes become trees. '
        "Distilled: with the teacher's losses."
    )
    plot(losses, folder / 'loss.png', 'iteration', 'training loss', note)
    aps = {
        name: {epoch: 100 * ap for epoch, ap in c.ap.items()}
        for name, c in curves.items()
    }
    plot(aps, folder / 'ap.png', 'epoch', 'AP on the validation tiles, %')


def plot(
    lines: Mapping[str, Mapping[int, float]],
    path: Path,
    xlabel: str,
    ylabel: str,
    note: str = '',
) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout='constrained')
    for name, line in lines.items():
        marker = 'o' if len(line) < 50 else None
        axes.plot(
            list(line),
            list(line.values()),
            color=COLORS[name],
            label=name,
            marker=marker,
            markersize=4,
            clip_on=False,
        )
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(lower_limit(lines), None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(note, fontsize=9, color='#555555')
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ---------------------------------------------------------------- pictures


def draw_pictures(
    tiles: Sequence[Tile],
    detections: Mapping[str, Sequence[Detections]],
    folder: Path,
    count: int = 6,
) -> None:
    """Draw tiles, taken at even distances: truth and every network's boxes."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob('*.png'):
        old.unlink()
    for index in range(0, len(tiles), -(-len(tiles) // count)):
        found = {name: rows[index] for name, rows in detections.items()}
        draw_tile(tiles[index], found, folder / f'{tiles[index].name}.png')


def draw_tile(
    tile: Tile, detections: Mapping[str, Detections], path: Path
) -> None:
    figure, panels = plt.subplots(
        1, 1 + len(detections), figsize=(14, 4), layout='constrained'
    )
    for panel in panels:
        panel.imshow(tile.pixels, interpolation='bicubic')
        panel.axis('off')
    draw_boxes(panels[0], tile.trees, 'white')
    panels[0].set_title(f'ground truth: {len(tile.trees)} trees')
    for panel, (name, found) in zip(
        panels[1:], detections.items(), strict=True
    ):
        boxes = found.boxes[found.scores >= SCORE]
        scores = found.scores[found.scores >= SCORE]
        right, seen = match(boxes, scores, tile.trees)
        draw_boxes(panel, tile.trees[~seen], MISSED, linestyle=':')
        draw_boxes(panel, boxes[~right], WRONG)
        draw_boxes(panel, boxes[right], RIGHT)
        panel.set_title(f'{name}: {seen.sum()} found, {(~right).sum()} wrong')
    figure.supxlabel(
        f'{tile.name}   ·   boxes of score ≥ {SCORE}: green finds a tree '
        '(IoU ≥ 0.5), red does not; dotted yellow: a tree that was missed',
        fontsize=9,
        color='#555555',
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_boxes(panel: Any, boxes: Boxes, color: str, **style: Any) -> None:
    for left, top, right, bottom in boxes:
        panel.add_patch(
            plt.Rectangle(
                (left, top),
                right - left,
                bottom - top,
                fill=False,
                edgecolor=color,
                linewidth=1.6,
                **style,
            )
        )


def match(
    boxes: Boxes, scores: np.ndarray, trees: Boxes, threshold: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Which boxes find a tree, and which trees are found.

    As in COCO's evaluation: by falling score, each box takes the tree it
    overlaps most among those not taken.
    """
    right = np.zeros(len(boxes), bool)
    seen = np.zeros(len(trees), bool)
    for index in np.argsort(-scores, kind='stable'):
        overlap = np.where(seen, -1, iou(boxes[index], trees))
        if len(trees) and overlap.max() >= threshold:
            right[index] = seen[overlap.argmax()] = True
    return right, seen


def iou(box: np.ndarray, others: Boxes) -> np.ndarray:
    """Intersection over union of a box with each of (N, 4)."""
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[2:], others[:, 2:])
    shared = (high - low).clip(min=0).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1)
    return shared / ((box[2:] - box[:2]).prod() + areas - shared)
