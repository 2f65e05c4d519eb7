"""Drawings for a page: SVG that follows its colours, photos with boxes."""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import matplotlib
import numpy as np

from mmkd.errors import PictureError

from .attention import Attention
from .evaluation import Objects, Picture, match_by_class
from .summary import SCORE, lower_limit

matplotlib.use('Agg')
from matplotlib import pyplot as plt

PALETTE = (
    '#0072b2', '#d55e00', '#009e73', '#cc79a7',
    '#e69f00', '#56b4e9', '#888888',
)  # fmt: skip
"""Okabe and Ito's colours, told apart also by the colour-blind."""
INK = '#010203'
"""Stands for the page's text colour, which is light in the dark."""
PLAIN_TEXT = {'text.parse_math': False}
"""Names of folders may have any character, also those of formulas."""
POINTS = 600
"""Of a curve; more are not seen."""
CUT = 97
"""Percentile of attention at which the colours end."""
WIDTH = 560
"""Of a photo, in pixels at most."""


@dataclass
class Box:
    """A rectangle to draw, in pixels of the file."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    """right, wrong, missed or truth"""
    text: str


@dataclass
class Panel:
    """A photo's title and the boxes on it."""

    title: str
    boxes: list[Box]


# ------------------------------------------------------------------- charts


@plt.rc_context(PLAIN_TEXT)
def curves(
    lines: Mapping[str, Mapping[int, float]],
    xlabel: str,
    ylabel: str,
    limits: tuple[float | None, float | None] | None = None,
) -> str:
    """A line each; empty if there is nothing to draw."""
    lines = {name: line for name, line in lines.items() if line}
    if not lines:
        return ''
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout='constrained')
    drawn = {}
    for number, (name, line) in enumerate(lines.items()):
        xs, ys = thinned(line)
        marker = 'o' if len(xs) < 50 else None
        (drawn[name],) = axes.plot(
            xs, ys, marker=marker, ms=4, clip_on=False, **style(number)
        )
    limits = limits or (lower_limit(lines), None)
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=limits)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return as_svg(figure, axes, drawn, f'{ylabel} by {xlabel}')


@plt.rc_context(PLAIN_TEXT)
def bars(groups: Mapping[str, Mapping[str, float | None]], ylabel: str) -> str:
    """Groups of bars: name of a run to label to height; None draws none."""
    labels = list(next(iter(groups.values())))
    figure, axes = plt.subplots(figsize=(6.4, 3.0), layout='constrained')
    width = 0.8 / len(groups)
    drawn = {}
    for number, (name, values) in enumerate(groups.items()):
        heights = np.array([values[label] for label in labels], float)
        places = np.arange(len(labels)) + (number + 0.5) * width - 0.4
        color = style(number)['color']
        drawn[name] = axes.bar(places, heights, width * 0.92, color=color)
    axes.set_xticks(range(len(labels)), labels)
    axes.set(ylabel=ylabel)
    return as_svg(figure, axes, drawn, f'{ylabel}: {", ".join(labels)}')


def style(number: int) -> dict[str, str]:
    """A colour, and once they are used up other strokes."""
    turn, color = divmod(number, len(PALETTE))
    return {'color': PALETTE[color], 'linestyle': ('-', '--', ':')[turn % 3]}


def thinned(line: Mapping[int, float]) -> tuple[list[int], list[float]]:
    """A curve of at most :data:`POINTS` points: means of neighbours."""
    step = -(-len(line) // POINTS)
    xs, ys = list(line), list(line.values())
    starts = range(0, len(xs), step)
    means = [float(np.mean(ys[i : i + step])) for i in starts]
    return [xs[min(i + step, len(xs)) - 1] for i in starts], means


def as_svg(
    figure: plt.Figure, axes: plt.Axes, drawn: Mapping[str, Any], title: str
) -> str:
    """The figure as an inline element in the page's own colours and font."""
    figure.legend(
        list(drawn.values()),
        list(drawn),  # its own choice leaves out names that begin with _
        loc='outside lower center',
        ncols=3,
        frameon=False,
        labelcolor=INK,
    )
    axes.grid(alpha=0.25, color=INK)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    axes.spines[['left', 'bottom']].set_color(INK)
    axes.tick_params(colors=INK)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)
    with plt.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': title}):
        text = io.StringIO()
        figure.savefig(
            text,
            format='svg',
            transparent=True,
            metadata={'Date': None, 'Creator': None},
        )
    plt.close(figure)
    svg = text.getvalue()[text.getvalue().index('<svg') :]
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.S)
    # Names of groups would occur once in each figure of the page.
    svg = re.sub(r' id="[a-z0-9.]+_\d+"', '', svg, flags=re.I)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1', svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1', svg, count=1)
    label = f'<svg class="chart" role="img" aria-label="{html.escape(title)}"'
    return svg.replace('<svg', label, 1).replace(INK, 'currentColor')


# ------------------------------------------------------------------- photos


def photo(picture: Picture) -> tuple[str, int, int]:
    """A photo as a data URI, and its height and width in the file."""
    image = cv2.imread(str(picture.path))
    if image is None:
        raise PictureError(
            f'{picture.path} could not be read as a picture. Bring the file '
            'back, or take it out of the annotations.'
        )
    height, width = image.shape[:2]
    if width > WIDTH:
        size = (WIDTH, max(round(height * WIDTH / width), 1))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return encoded(image, '.jpg', cv2.IMWRITE_JPEG_QUALITY, 80), height, width


def encoded(image: np.ndarray, kind: str, *options: int) -> str:
    data = base64.b64encode(cv2.imencode(kind, image, options)[1]).decode()
    mime = {'.jpg': 'jpeg', '.png': 'png'}[kind]
    return f'data:image/{mime};base64,{data}'


def panels(picture: Picture, runs: Sequence[str]) -> list[Panel]:
    """Ground truth, then what each run has found."""
    truth = picture.truth
    title = f'ground truth: {len(truth.boxes)}'
    every = range(len(truth.boxes))
    drawn = [Panel(title, [as_box(truth, i, 'truth') for i in every])]
    for run in runs:
        found = picture.found[run].above(SCORE)
        right, seen = match_by_class(truth, found)
        boxes = [as_box(truth, i, 'missed') for i in np.flatnonzero(~seen)]
        boxes += [as_box(found, i, 'wrong') for i in np.flatnonzero(~right)]
        boxes += [as_box(found, i, 'right') for i in np.flatnonzero(right)]
        title = f'{run}: {seen.sum()} found, {(~right).sum()} wrong'
        drawn.append(Panel(title, boxes))
    return drawn


def as_box(objects: Objects, index: int, kind: str) -> Box:
    left, top, right, bottom = objects.boxes[index].round(1).tolist()
    text = objects.names[index]
    if kind in ('right', 'wrong'):
        text += f' {objects.scores[index]:.2f}'
    width, height = round(right - left, 1), round(bottom - top, 1)
    return Box(left, top, width, height, kind, text)


# ------------------------------------------------------------ heat on photos


def heat(seen: Attention) -> dict[str, str]:
    """PNGs to lay over a photo: teacher, student, and their difference.

    Both networks by one scale, yellow is high. In the difference, blue is
    where the student looks more, red where the teacher does. The few highest
    values are cut off: along an edge to padding they outshine all others.
    """
    apart = seen.student - seen.teacher
    high = np.percentile([seen.student, seen.teacher], CUT) + 1e-30
    most = np.percentile(abs(apart), CUT) + 1e-30
    share = (apart / most).clip(-1, 1)
    return {
        'teacher': layer(plt.cm.viridis(seen.teacher / high), 0.65),
        'student': layer(plt.cm.viridis(seen.student / high), 0.65),
        'difference': layer(
            plt.cm.RdBu(share / 2 + 0.5), 0.85 * np.sqrt(abs(share))
        ),
    }


def layer(colored: np.ndarray, alpha: np.ndarray | float) -> str:
    """Colours (H, W, 4) from 0 to 1 as a PNG with that opacity."""
    colored[..., 3] = alpha
    bgra = (255 * colored[..., [2, 1, 0, 3]]).round().astype(np.uint8)
    return encoded(bgra, '.png')
