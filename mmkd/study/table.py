"""The table of a study: means, spreads and paired differences."""

import contextlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy import stats

from mmkd.data.files import write_text
from mmkd.errors import MMKDError
from mmkd.report.tables import table as markdown

from .inputs import versions
from .run import INPUTS, Run, Tested
from .step import now, write_json
from .study import Study

Results = Mapping[int, Mapping[str, Any]]
"""The results of a network by seed."""


@dataclass
class Spread:
    """The mean of n values and their standard deviation (n - 1).

    ``p`` is that of a two-sided paired t-test against no difference; None
    where it is not defined: with one pair, or differences that are all equal.
    """

    n: int
    mean: float
    deviation: float | None
    p: float | None = None

    def text(self, sign: str = '') -> str:
        """Write it in per cent, such as ``42.0 ± 2.0 (p 0.012)``."""
        text = f'{100 * self.mean + 0.0:{sign}.1f}'
        if self.deviation is not None:
            text += f' ± {100 * self.deviation:.1f}'
        if self.p is not None:
            tiny = self.p < 0.001
            text += ' (p < 0.001)' if tiny else f' (p {self.p:.3f})'
        return text


def spread(values: Sequence[float]) -> Spread:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(len(values), statistics.fmean(values), deviation)


def gain(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Return the spread of the differences of pairs, with its p."""
    pairs = zip(ours, theirs, strict=True)
    found = spread([a - b for a, b in pairs])
    # Metrics have three decimals; what is smaller comes from subtracting.
    if found.deviation is not None and found.deviation > 1e-9:
        found.p = float(stats.ttest_rel(ours, theirs).pvalue)
    return found


def write_table(study: Study) -> str:
    """Write table.json and table.md; return the latter."""
    done: dict[str, Results] = {
        network: {r.seed: r.result for r in study.of(network) if r.result}
        for network in study.networks
    }
    gains, troubles = paired(study, done), troubles_of(study)
    parts = [
        f'# {study.name}',
        results_table(study, done, troubles['stale']),
        gains_table(study, gains),
        remarks(study),
        listed('Stale, from before a change', troubles['stale']),
        listed('Failed', troubles['failed']),
        listed('Not done yet', dict.fromkeys(troubles['missing'], '')),
    ]
    text = '\n\n'.join(filter(None, parts))
    write_text(study.work_dir / 'table.md', text + '\n')
    content = {
        'study': study.name,
        'seeds': study.seeds,
        'baseline': study.baseline,
        'baselines': study.baselines,
        'metrics': study.metrics,
        'runs': {name: summary(study, rows) for name, rows in done.items()},
        'gains': {
            network: {name: asdict(row) for name, row in rows.items()}
            for network, rows in gains.items()
        },
        **troubles,
        'written': now(),
        'versions': versions(),
    }
    write_json(study.work_dir / 'table.json', content)
    return text


def troubles_of(study: Study) -> dict[str, Any]:
    """Return the runs that are stale, have failed, or are not done yet."""
    stale = {run.name: why for run in study.runs if (why := staleness(run))}
    failed = {run.name: run.failure for run in study.runs if run.failure}
    missing = [
        run.name for run in study.runs if not (run.result or run.failure)
    ]
    return {'stale': stale, 'failed': failed, 'missing': missing}


def metric(results: Results, key: str) -> list[float]:
    return [result['metrics'][key] for result in results.values()]


def paired(
    study: Study, done: Mapping[str, Results]
) -> dict[str, dict[str, Spread]]:
    """Return each network's gains over the same seeds of its baseline."""
    gains = {}
    for network, rows in done.items():
        base = done.get(study.baselines.get(network, ''), {})
        ours = {seed: rows[seed] for seed in rows if seed in base}
        theirs = {seed: base[seed] for seed in ours}
        if ours and base is not rows:
            gains[network] = {
                name: gain(metric(ours, key), metric(theirs, key))
                for name, key in study.metrics.items()
            }
    return gains


def summary(study: Study, rows: Results) -> dict[str, Any]:
    """Return a network's results by seed, and over the seeds."""
    over = {
        name: asdict(spread(metric(rows, key)))
        for name, key in study.metrics.items()
        if rows
    }
    return {'over_seeds': over, 'by_seed': dict(rows)}


# -------------------------------------------------------------------- tables


def results_table(
    study: Study, done: Mapping[str, Results], stale: Mapping[str, str]
) -> str:
    header = ['run', 'seeds', *study.metrics]
    header += ['training, min', 'CPU, min', 'memory, MiB', 'teacher']
    rows = []
    for network, results in done.items():
        names = {run.name for run in study.of(network)}
        mark = ' (stale)' if names & stale.keys() else ''
        cells = [network + mark, str(len(results))]
        if results:
            cells += [
                spread(metric(results, key)).text()
                for key in study.metrics.values()
            ]
            cells += costs(results)
        rows.append(cells + [''] * (len(header) - len(cells)))
    return markdown(header, rows)


def costs(results: Results) -> list[str]:
    """Return the cells of a network's times, memory and teacher."""
    found = list(results.values())
    minutes = [
        statistics.fmean(result[key] / 60 for result in found)
        for key in ('training_seconds', 'training_cpu_seconds')
    ]
    # As in the names of checkpoints; a run may have several teachers.
    teachers = [
        ' '.join(part[:8] for part in result['inputs']['teacher'].split())
        for result in found
    ]
    return [
        *(f'{each:.1f}' for each in minutes),
        f'{max(result["memory_mib"] for result in found):.0f}',
        ', '.join(filter(None, teachers)),
    ]


def gains_table(
    study: Study, gains: Mapping[str, Mapping[str, Spread]]
) -> str:
    header = [f'gain over {study.baseline}', 'pairs', *study.metrics]
    rows = []
    for network, found in gains.items():
        pairs = str(next(iter(found.values())).n)
        rows.append([network, pairs, *(g.text('+') for g in found.values())])
    return markdown(header, rows) if rows else ''


def remarks(study: Study) -> str:
    """Say what the numbers are."""
    text = (
        'Metrics are in per cent, of the last checkpoint of each run: mean ± '
        'standard deviation (n - 1) over the seeds. Training is the mean wall '
        'time on this machine, where several jobs ran side by side; CPU is '
        'the processor time in it, which other work prolongs less. Memory is '
        "the largest peak, of the GPU or else of the run's process. Teacher "
        "is the start of its checkpoint's SHA-256, by seed."
    )
    tested = {
        r.network: r.source.network
        for r in study.runs
        if isinstance(r, Tested)
    }
    if tested:
        named = ', '.join(f'{n} of {source}' for n, source in tested.items())
        text += (
            ' These runs are only tested, and have the training and memory of '
            f'the run that trained all its networks: {named}.'
        )
    if study.baseline is None:
        return text
    several = len({*study.baselines.values()}) > 1
    return (
        f'{text} Gains are differences between runs of the same seed'
        f'{" and data" if several else ""}; p is that of a two-sided paired '
        't-test, not corrected for the number of comparisons, and absent '
        'where it is not defined.'
    )


def staleness(run: Run) -> str:
    """Return what has changed since a result; empty if nothing has."""
    changed: list[str] = []
    if run.result:
        with contextlib.suppress(MMKDError, OSError):
            changed = run.changed()
    return ', '.join(f'{INPUTS[key]} changed' for key in changed)


def listed(title: str, items: Mapping[str, str]) -> str:
    lines = [
        f'- {name}{": " if why else ""}{why}' for name, why in items.items()
    ]
    return f'{title}:\n\n' + '\n'.join(lines) if lines else ''
