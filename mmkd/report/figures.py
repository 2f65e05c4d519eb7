"""Draw charts, as SVG in a page's own colours, and photos with boxes."""

import base64
import html
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import matplotlib
import numpy as np
from cycler import cycler

from mmkd.data.pictures import too_large
from mmkd.errors import PictureError

from .attention import Attention
from .evaluation import DRAWN, Objects, Picture, match

matplotlib.use('Agg')
from matplotlib import pyplot as plt

Line = Mapping[int, float]
"""A curve: the value at each step."""

INK = '#010203'
"""Stands for the page's text colour, which is light in dark mode."""
PALETTE = (
    '#0072b2', '#d55e00', '#009e73', '#cc79a7',
    '#e69f00', '#56b4e9', '#888888',
)  # fmt: skip
"""The colours of Okabe and Ito, which the colour-blind can tell apart."""
STYLE: dict[Any, Any] = {
    # The colours change fastest; once all are used, so does the stroke.
    'axes.prop_cycle': cycler(linestyle=('-', '--', ':'))
    * cycler(color=PALETTE),
    'axes.axisbelow': True,
    'axes.grid': True,
    'axes.spines.right': False,
    'axes.spines.top': False,
    'figure.constrained_layout.use': True,
    'font.size': 11,
    'grid.alpha': 0.25,
    'legend.frameon': False,
    'lines.markersize': 4,
    'svg.fonttype': 'none',
    # Names of folders may hold any character, also $, which starts maths.
    'text.parse_math': False,
    **dict.fromkeys(
        (
            'axes.edgecolor', 'axes.labelcolor', 'grid.color', 'text.color',
            'xtick.color', 'ytick.color',
        ),
        INK,
    ),
}  # fmt: skip
"""The look of all charts, as matplotlib's settings."""
POINTS = 600
"""The largest number of points of a curve; no more could be seen."""
CUT = 97
"""Percentile of attention at which the colours end."""
SIZE = (720, 900)
"""The largest width and height of a photo in the page, in pixels."""
COLORS = {
    **{'truth': '#ffffff', 'right': '#56b4e9'},
    **{'wrong': '#ff7a3d', 'missed': '#f0e442'},
}
"""The colour of a box by its kind; the colour-blind can tell them apart."""
DASHES = {'missed': '4 3'}
"""The stroke of a box that is no line."""
LABELLED = 25
"""Boxes have labels where no network has more than these on a photo."""


@dataclass
class Box:
    """A rectangle to draw, in pixels of the file."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    """right, wrong, missed or truth"""
    name: str
    """Its class."""
    score: str
    """That of what was found; else empty."""

    @property
    def text(self) -> str:
        return f'{self.name} {self.score}'.rstrip()


@dataclass
class Panel:
    """The boxes on a photo, and their title, which counts them."""

    name: str
    boxes: list[Box]

    @property
    def title(self) -> str:
        count = Counter(box.kind for box in self.boxes)
        if not self.name:
            return f'ground truth: {count["truth"]}'
        return (
            f'{self.name}: {count["right"]} found, {count["missed"]} missed, '
            f'{count["wrong"]} false'
        )


# ------------------------------------------------------------------- charts


def line_chart(
    lines: Mapping[str, Line],
    xlabel: str,
    ylabel: str,
    limits: tuple[float | None, float | None] | None = None,
) -> plt.Figure:
    """Draw one line per name; an axis without limits begins at 0 if it can."""
    negative = any(y < 0 for line in lines.values() for y in line.values())
    limits = limits or (None if negative else 0, None)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.2, 3.4))
        for line in lines.values():
            xs, ys = thinned(line)
            marker = 'o' if len(xs) < 50 else ''
            axes.plot(xs, ys, marker=marker, clip_on=False)
        axes.set(xlabel=xlabel, ylabel=ylabel, ylim=limits)
        axes.locator_params('x', integer=True, min_n_ticks=1)
        add_legend(figure, axes.lines, lines)
    return figure


def curves(
    lines: Mapping[str, Line],
    xlabel: str,
    ylabel: str,
    limits: tuple[float | None, float | None] | None = None,
) -> str:
    """Return a line chart as SVG; empty if there is nothing to draw."""
    lines = {name: line for name, line in lines.items() if line}
    if not lines:
        return ''
    figure = line_chart(lines, xlabel, ylabel, limits)
    return as_svg(figure, f'{ylabel} by {xlabel}')


def bars(groups: Mapping[str, Mapping[str, float | None]], ylabel: str) -> str:
    """Return bars as SVG.

    Args:
        groups: Name of a run to label to height; None leaves the bar out.
        ylabel: What the heights are.
    """
    labels = list(next(iter(groups.values())))
    width = 0.8 / len(groups)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.2, 3.0))
        for number, values in enumerate(groups.values()):
            heights = np.array([values[label] for label in labels], float)
            places = np.arange(len(labels)) + (number + 0.5) * width - 0.4
            axes.bar(places, heights, width * 0.92)
        axes.set_xticks(range(len(labels)), labels)
        axes.set(ylabel=ylabel)
        add_legend(figure, axes.containers, groups)
    return as_svg(figure, f'{ylabel}: {", ".join(labels)}')


def add_legend(figure: plt.Figure, drawn: Any, names: Iterable[str]) -> None:
    # Left to itself, a legend leaves out names that begin with _.
    figure.legend(list(drawn), names, loc='outside lower center', ncols=3)


def thinned(line: Line) -> tuple[list[int], list[float]]:
    """Reduce a curve to :data:`POINTS` points, means of neighbours."""
    step = -(-len(line) // POINTS)
    xs, ys = list(line), list(line.values())
    starts = range(0, len(xs), step)
    means = [float(np.mean(ys[i : i + step])) for i in starts]
    return [xs[min(i + step, len(xs)) - 1] for i in starts], means


def as_svg(figure: plt.Figure, title: str) -> str:
    """Return a figure as an inline element in the page's colours and font."""
    text = io.StringIO()
    with plt.rc_context({**STYLE, 'svg.hashsalt': title}):
        figure.savefig(
            text,
            format='svg',
            transparent=True,
            metadata={'Date': None, 'Creator': None},
        )
    plt.close(figure)
    svg = text.getvalue().partition('<svg')[2]
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.S)
    # The page would hold the same names of groups once per figure.
    svg = re.sub(r' id="[a-z0-9.]+_\d+"', '', svg, flags=re.I)
    svg = re.sub(r' (width|height)="[^"]*pt"', '', svg, count=2)
    svg = svg.replace(INK, 'currentColor')
    label = html.escape(title)
    return f'<svg class="chart" role="img" aria-label="{label}"{svg}'


# ------------------------------------------------------------------- photos


def photo(picture: Picture) -> tuple[str, int, int]:
    """Return a photo as a data URI, and its height and width in the file.

    Raises:
        PictureError: If the photo cannot be read.
    """
    if problem := too_large(picture.path):
        raise PictureError(problem)
    image = cv2.imread(str(picture.path))
    if image is None:
        raise PictureError(
            f'{picture.path} could not be read as a picture. Bring the file '
            'back, or take it out of the annotations.'
        )
    height, width = image.shape[:2]
    scale = min(SIZE[0] / width, SIZE[1] / height)
    if scale < 1:
        size = [max(round(scale * length), 1) for length in (width, height)]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return encoded(image, 'jpeg', cv2.IMWRITE_JPEG_QUALITY, 80), height, width


def encoded(image: np.ndarray, kind: str, *options: int) -> str:
    data = cv2.imencode(f'.{kind}', image, options)[1].tobytes()
    return f'data:image/{kind};base64,{base64.b64encode(data).decode()}'


def panels(
    picture: Picture,
    runs: Sequence[str],
    scores: Mapping[str, float] | None = None,
) -> list[Panel]:
    """Return the ground truth, then what each run has found.

    Args:
        picture: The picture.
        runs: The networks.
        scores: The score from which on the boxes of each are drawn, by
            default :data:`DRAWN`.
    """
    truth = picture.truth
    every = range(len(truth.boxes))
    drawn = [Panel('', [as_box(truth, i, 'truth') for i in every])]
    for run in runs:
        found = picture.found[run].above((scores or {}).get(run, DRAWN))
        right, seen = match(truth, found)
        boxes = [as_box(truth, i, 'missed') for i in np.flatnonzero(~seen)]
        boxes += [as_box(found, i, 'wrong') for i in np.flatnonzero(~right)]
        boxes += [as_box(found, i, 'right') for i in np.flatnonzero(right)]
        drawn.append(Panel(run, boxes))
    return drawn


def as_box(objects: Objects, index: int, kind: str) -> Box:
    left, top, right, bottom = objects.boxes[index].round(1).tolist()
    score = ''
    if kind in ('right', 'wrong'):
        score = f'{objects.scores[index]:.2f}'
    name = str(objects.names[index])
    width, height = round(right - left, 1), round(bottom - top, 1)
    return Box(left, top, width, height, kind, name, score)


# ------------------------------------------------------------ heat on photos


def heat(seen: Attention) -> dict[str, str]:
    """Return PNGs to lay over a photo: teacher, student and difference.

    Both networks have the same scale, in which yellow is high. In the
    difference, blue is where the student looks more, and red is where the
    teacher does. The few highest values are cut off, because along an edge to
    padding they outshine all others.
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
    """Return colours (H, W, 4) from 0 to 1 as a PNG with that opacity."""
    colored[..., 3] = alpha
    bgra = (255 * colored[..., [2, 1, 0, 3]]).round().astype(np.uint8)
    return encoded(bgra, 'png')
