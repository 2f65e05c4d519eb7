"""Say in plain words what distillation gained, and how sure that is.

Two uncertainties are kept apart. That of *training* is how far other seeds
may differ, on these images; it takes several seeds (:func:`t_interval`). That
of *measurement* is how far other images may differ, with these trained
networks; it takes one seed (:func:`mmkd.report.bootstrap.paired_bootstrap`).
"""

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from scipy import stats

LEVEL = 0.95
"""The confidence of all intervals."""
SAME_SPEED = 1.1
"""Times within this factor of each other are called the same."""
OUTCOMES = Literal['gained', 'harmed', 'unshown', 'incomparable', 'unknown']


@dataclass(frozen=True)
class Network:
    """The figures of one network.

    Attributes:
        aps: The average precision, from 0 to 1, by seed.
        gflops: The FLOPs of an image, where a multiply-add counts as one.
        ms: The time of an image in milliseconds.
    """

    name: str
    aps: Mapping[int, float]
    parameters: int | None = None
    gflops: float | None = None
    ms: float | None = None

    @property
    def ap(self) -> float:
        return statistics.fmean(self.aps.values())


@dataclass(frozen=True)
class Interval:
    """Where a difference of average precisions lies, from -1 to 1.

    Attributes:
        count: The number of pairs of seeds or of images that it rests on.
    """

    low: float
    high: float
    count: int

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        return f'{signed(self.low)} to {signed(self.high)}'


@dataclass(frozen=True)
class Verdict:
    """What can be said of a distilled student.

    Attributes:
        outcome: ``unshown`` if the interval includes 0, or there is none;
            ``incomparable`` if the runs differ in more than distillation;
            ``unknown`` if there is nothing to compare with.
        headline: The verdict in one sentence.
        details: What it rests on, a sentence or two each.
        gain: Distilled less plain, from -1 to 1.
        share: The share of the teacher's lead that was gained; None where the
            teacher does not lead.
        interval: That of the gain, by which the outcome was chosen.
        plain: The name of the plain network, if there is one.
        distilled: The name of the distilled one.
    """

    outcome: OUTCOMES
    headline: str
    details: list[str] = field(default_factory=list)
    gain: float | None = None
    share: float | None = None
    interval: Interval | None = None
    plain: str = ''
    distilled: str = ''

    def text(self, width: int = 79) -> str:
        """Return it for a terminal."""
        lines = [textwrap.fill(self.headline, width)]
        lines += [
            textwrap.fill(each, width, initial_indent='  ',
                          subsequent_indent='  ')
            for each in self.details
        ]  # fmt: skip
        return '\n'.join(lines)


def verdict(
    plain: Network | None,
    distilled: Network | None,
    teacher: Network | None = None,
    *,
    metric: str = 'AP',
    images: Interval | None = None,
    problems: Sequence[str] = (),
    remarks: Sequence[str] = (),
    hints: Sequence[str] = (),
    distils: bool = True,
) -> Verdict:
    """Judge a distilled student.

    Args:
        plain: The same student, trained without distillation.
        distilled: The distilled student.
        teacher: Its teacher.
        metric: What the figures are.
        images: The paired bootstrap interval of the gain over the images.
        problems: Why plain and distilled must not be compared.
        remarks: What else should be known, in whole sentences.
        hints: What to look at next, should distillation have harmed.
        distils: False compares any two networks, without a teacher.

    Example:
        >>> plain = Network('plain', {0: 0.120}, 500_000, 0.3, 12.0)
        >>> ours = Network('PKD', {0: 0.151}, 500_000, 0.3, 12.1)
        >>> found = verdict(
        ...     plain,
        ...     ours,
        ...     Network('teacher', {0: 0.189}),
        ...     images=Interval(0.019, 0.043, 72),
        ... )
        >>> print(found.headline)  # doctest: +NORMALIZE_WHITESPACE
        Distillation (PKD) gained 3.1 AP (12.0 → 15.1), 45 % of the teacher's
        lead, at the same size and speed.
    """
    if distilled is None or plain is None:
        found = _unknown(plain, distilled, teacher, metric)
        return replace(found, details=[*found.details, *remarks])
    names = (plain.name, distilled.name)
    base, ours, seeds = t_interval(plain, distilled)
    gain = ours.ap - base.ap
    details = _teacher(base, teacher, metric) if distils else []
    details += remarks
    if problems:
        return Verdict(
            'incomparable',
            f'{base.name} and {ours.name} are not comparable: '
            f'{"; ".join(problems)}.',
            _as_they_are(base, ours, metric) + details,
            *(gain, None, None, *names),
        )
    lead = None if teacher is None else teacher.ap - base.ap
    share = gain / lead if lead is not None and lead > 0 else None
    interval = seeds or images
    outcome = _outcome(interval)
    say = _of_distillation if distils else _of_difference
    headline = say(outcome, base, ours, metric)
    if outcome == 'unshown':
        headline += (
            ', how much of it is chance is not known.'
            if interval is None
            else f', and the true gain may lie anywhere from {interval}.'
        )
    else:
        headline += _share(share) * (outcome == 'gained')
        headline += f'{_cost(plain, distilled)}.'
    details = [
        *_uncertainty(plain, distilled, seeds, images, metric),
        *details,
    ]
    if outcome == 'harmed' and distils:
        details += [f'Look at next: {hint}' for hint in hints]
    return Verdict(outcome, headline, details, gain, share, interval, *names)


def t_interval(
    plain: Network, distilled: Network
) -> tuple[Network, Network, Interval | None]:
    r"""Return the confidence interval of the gain over seeds.

    Seeds that both have make pairs, and the interval is
    :math:`\bar d \pm t_{n-1} s_d / \sqrt n` over the differences *d* of the
    pairs. Without two pairs but with two seeds each, it is Welch's.

    Returns:
        Both networks with the seeds that count, and the interval; None with
        fewer seeds.
    """
    both = sorted(plain.aps.keys() & distilled.aps.keys())
    if len(both) > 1:
        plain, distilled = (
            replace(each, aps={seed: each.aps[seed] for seed in both})
            for each in (plain, distilled)
        )
        gains = [distilled.aps[seed] - plain.aps[seed] for seed in both]
        error = statistics.stdev(gains) / math.sqrt(len(gains))
        freedom = len(gains) - 1.0
    elif min(len(plain.aps), len(distilled.aps)) > 1:
        spreads = [
            statistics.variance(each.aps.values()) / len(each.aps)
            for each in (plain, distilled)
        ]
        error = math.sqrt(sum(spreads))
        terms = [
            spread**2 / (len(each.aps) - 1)
            for spread, each in zip(spreads, (plain, distilled), strict=True)
        ]
        freedom = sum(spreads) ** 2 / sum(terms) if sum(terms) else 1.0
    else:
        return plain, distilled, None
    gain = distilled.ap - plain.ap
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    count = min(len(plain.aps), len(distilled.aps))
    return plain, distilled, Interval(gain - half, gain + half, count)


# ------------------------------------------------------------------ in words


def points(value: float) -> str:
    """Write an average precision in per cent."""
    return f'{round(100 * value, 1) + 0.0:.1f}'


def signed(value: float) -> str:
    """Write a difference of average precisions in per cent."""
    return f'{round(100 * value, 1) + 0.0:+.1f}'


def _outcome(interval: Interval | None) -> OUTCOMES:
    if interval is None or interval.low <= 0 <= interval.high:
        return 'unshown'
    return 'gained' if interval.low > 0 else 'harmed'


def _of_distillation(
    outcome: OUTCOMES, plain: Network, distilled: Network, metric: str
) -> str:
    gain = distilled.ap - plain.ap
    change = f'({points(plain.ap)} → {points(distilled.ap)})'
    name = '' if distilled.name == 'distilled' else f' ({distilled.name})'
    if outcome == 'gained':
        return f'Distillation{name} gained {points(gain)} {metric} {change}'
    if outcome == 'harmed':
        return f'Distillation{name} harmed: {signed(gain)} {metric} {change}'
    what = 'No gain' if gain > -0.0005 else 'Neither gain nor harm'
    return f'{what} is shown{name}: {signed(gain)} {metric} {change}'


def _of_difference(
    outcome: OUTCOMES, one: Network, other: Network, metric: str
) -> str:
    gain = other.ap - one.ap
    change = f'({points(other.ap)} against {points(one.ap)})'
    if outcome == 'unshown':
        return (
            f'No difference between {one.name} and {other.name} is shown: '
            f'{signed(gain)} {metric} {change}'
        )
    place = 'ahead of' if outcome == 'gained' else 'behind'
    return (
        f'{other.name} is {points(abs(gain))} {metric} {place} {one.name} '
        f'{change}'
    )


def _share(share: float | None) -> str:
    if share is None:
        return ''
    if share > 1:
        return ", more than the teacher's lead"
    return f", {100 * share:.0f} % of the teacher's lead"


def _cost(plain: Network, distilled: Network) -> str:
    """Compare size and speed, as far as they are known."""
    same, other = [], []
    if plain.parameters and distilled.parameters:
        if plain.parameters == distilled.parameters:
            same.append('size')
        else:
            ratio = distilled.parameters / plain.parameters
            other.append(f'{ratio:.2g} times the parameters')
    if plain.ms and distilled.ms:
        ratio = distilled.ms / plain.ms
        if 1 / SAME_SPEED <= ratio <= SAME_SPEED:
            same.append('speed')
        else:
            other.append(f'{ratio:.2g} times the time per image')
    parts = [f'the same {" and ".join(same)}'] * bool(same) + other
    return f', at {" and ".join(parts)}' if parts else ''


def _uncertainty(
    plain: Network,
    distilled: Network,
    seeds: Interval | None,
    images: Interval | None,
    metric: str,
) -> list[str]:
    found = []
    if seeds is not None:
        paired = len(plain.aps.keys() & distilled.aps.keys()) > 1
        over = (
            f'{seeds.count} pairs of seeds'
            if paired
            else f'{len(plain.aps)} and {len(distilled.aps)} seeds'
        )
        found.append(
            f'Training: {seeds} {metric} over {over} (95 % t-interval of the '
            'mean gain). This is the uncertainty from seeds, on these images.'
        )
    if images is not None:
        found.append(
            f'Measurement: {images} {metric} (95 % paired bootstrap over '
            f'{images.count} images). This is the uncertainty from the choice '
            'of images, with these trained networks.'
        )
    if seeds is None:
        each = len(plain.aps) == len(distilled.aps) == 1
        who = 'One seed each' if each else 'Too few seeds for an interval'
        text = f'{who}: '
        if images is not None:
            text += (
                f'differences below about {points(images.half)} {metric} may '
                'be chance by the choice of images alone, and what another '
                'seed would change is not known.'
            )
        else:
            text += 'what another seed would change is not known.'
        found.append(f'{text} Train several seeds to know (`mmkd study`).')
    return found


def _teacher(
    plain: Network, teacher: Network | None, metric: str
) -> list[str]:
    if teacher is None:
        return []
    lead = teacher.ap - plain.ap
    figures = f'({points(teacher.ap)} against {points(plain.ap)} {metric})'
    if lead > 0:
        return [
            f'The teacher leads the plain student by {points(lead)} {metric} '
            f'{figures}.'
        ]
    return [
        f'The teacher is not ahead of the plain student {figures}, so there '
        'is no lead to gain.'
    ]


def _as_they_are(plain: Network, distilled: Network, metric: str) -> list[str]:
    gain = signed(distilled.ap - plain.ap)
    return [
        f'As they are, {plain.name} has {points(plain.ap)} and '
        f'{distilled.name} {points(distilled.ap)} {metric} ({gain}). How '
        'much of that comes from distillation cannot be told.',
        'Train both in the same way but for `distillation`.',
    ]


def _unknown(
    plain: Network | None,
    distilled: Network | None,
    teacher: Network | None,
    metric: str,
) -> Verdict:
    """Say what is there, and what is missing for a verdict."""
    reached = ', '.join(
        f'{each.name} {points(each.ap)} {metric}'
        for each in (plain, distilled, teacher)
        if each is not None
    )
    if distilled is not None:
        headline = (
            f'What distillation ({distilled.name}) gained is not known: there '
            'is no plain run of this student to compare with.'
        )
        remedy = (
            'Train the student without `distillation`, otherwise alike, and '
            'give its folder too.'
        )
    else:
        headline = 'There is no distilled run to judge.'
        remedy = 'Give the folders of a plain and of a distilled student.'
    return Verdict('unknown', headline, [f'Reached: {reached}.', remedy])
