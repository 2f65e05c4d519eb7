"""The table of a study: means, spreads and paired differences."""

import contextlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy import stats

from mmkd.errors import CheckpointError, ConfigError
from mmkd.report.tables import table as markdown

from .run import INPUTS, Run, Tested, libraries
from .study import Study
from .training import now, versions, write_json


@dataclass
class Spread:
    """Of n values; the deviation is that of a sample (n - 1).

    ``p`` is that of a two-sided paired t-test against no difference; None
    where it is not defined: with one pair, or differences that are all equal.
    """

    n: int
    mean: float
    deviation: float | None
    p: float | None = None

    def text(self, sign: str = '') -> str:
        """In per cent."""
        text = f'{100 * self.mean + 0.0:{sign}.1f}'
        if self.deviation is not None:
            text += f' ± {100 * self.deviation:.1f}'
        return text


def spread(values: Sequence[float]) -> Spread:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(len(values), statistics.fmean(values), deviation)


def gain(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """The differences of pairs, and whether chance explains them."""
    pairs = zip(ours, theirs, strict=True)
    found = spread([a - b for a, b in pairs])
    # Metrics have three decimals; what is smaller comes from subtracting.
    if found.deviation is not None and found.deviation > 1e-9:
        found.p = float(stats.ttest_rel(ours, theirs).pvalue)
    return found


def write_table(study: Study) -> str:
    """Write table.json and table.md; return the latter."""
    results = {
        network: {run.seed: run.result for run in study.of(network)}
        for network in study.networks
    }
    done = {
        network: {seed: result for seed, result in rows.items() if result}
        for network, rows in results.items()
    }
    gains = paired(study, done)
    stale = {run.name: why for run in study.runs if (why := staleness(run))}
    failed = {run.name: run.failure for run in study.runs if run.failure}
    missing = [
        run.name
        for run in study.runs
        if not done[run.network].get(run.seed) and run.name not in failed
    ]
    text = '\n\n'.join(
        [
            f'# {study.name}',
            results_table(study, done, stale),
            *gains_table(study, gains),
            remarks(study),
            *listed('Stale, from before a change', stale),
            *listed('Failed', failed),
            *listed('Not done yet', dict.fromkeys(missing, '')),
        ]
    )
    (study.work_dir / 'table.md').write_text(text + '\n')
    write_json(
        study.work_dir / 'table.json',
        {
            'study': study.name,
            'seeds': study.seeds,
            'baseline': study.baseline,
            'baselines': study.baselines,
            'metrics': study.metrics,
            'runs': {
                network: summary(study, rows) for network, rows in done.items()
            },
            'gains': {
                network: {name: asdict(row) for name, row in rows.items()}
                for network, rows in gains.items()
            },
            'stale': stale,
            'failed': failed,
            'missing': missing,
            'written': now(),
            'versions': versions() | libraries(),
        },
    )
    return text


def paired(
    study: Study, done: Mapping[str, Mapping[int, Any]]
) -> dict[str, dict[str, Spread]]:
    """Per network and metric, its gain over its baseline's same seeds."""
    gains = {}
    for network, rows in done.items():
        base = done.get(study.baselines.get(network, ''), {})
        seeds = [seed for seed in rows if seed in base]
        if seeds and base is not rows:
            gains[network] = {
                name: gain(
                    [rows[seed]['metrics'][key] for seed in seeds],
                    [base[seed]['metrics'][key] for seed in seeds],
                )
                for name, key in study.metrics.items()
            }
    return gains


def summary(study: Study, rows: Mapping[int, Any]) -> dict[str, Any]:
    """A network's results by seed, and over the seeds."""
    over = {
        name: asdict(spread([row['metrics'][key] for row in rows.values()]))
        for name, key in study.metrics.items()
        if rows
    }
    return {'over_seeds': over, 'by_seed': dict(rows)}


def results_table(
    study: Study,
    done: Mapping[str, Mapping[int, Any]],
    stale: Mapping[str, str],
) -> str:
    header = ['run', 'seeds', *study.metrics]
    header += ['training, min', 'CPU, min', 'memory, MiB', 'teacher']
    rows = []
    for network, results in done.items():
        values = list(results.values())
        cells = [
            spread([r['metrics'][key] for r in values]).text()
            if values
            else ''
            for key in study.metrics.values()
        ]
        if values:
            for key in ('training_seconds', 'training_cpu_seconds'):
                times = [r[key] / 60 for r in values]
                cells.append(f'{statistics.fmean(times):.1f}')
            cells.append(f'{max(r["memory_mib"] for r in values):.0f}')
            teachers = [r['inputs']['teacher'] for r in values]
            # As in names of checkpoints; a run may have several teachers.
            shown = [
                ' '.join(part[:8] for part in hashes.split())
                for hashes in teachers
                if hashes
            ]
            cells.append(', '.join(shown))
        names = {run.name for run in study.of(network)}
        mark = ' (stale)' if names & stale.keys() else ''
        cells += [''] * (len(header) - 2 - len(cells))
        rows.append([network + mark, str(len(values)), *cells])
    return markdown(header, rows)


def gains_table(
    study: Study, gains: Mapping[str, Mapping[str, Spread]]
) -> list[str]:
    if not gains:
        return []
    header = [f'gain over {study.baseline}', 'pairs', *study.metrics]
    rows = []
    for network, found in gains.items():
        pairs = str(next(iter(found.values())).n)
        cells = [f'{g.text("+")}{p_value(g)}' for g in found.values()]
        rows.append([network, pairs, *cells])
    return [markdown(header, rows)]


def p_value(found: Spread) -> str:
    if found.p is None:
        return ''
    return ' (p < 0.001)' if found.p < 0.001 else f' (p {found.p:.3f})'


def remarks(study: Study) -> str:
    """What the numbers are."""
    text = (
        'Metrics in per cent, of the last checkpoint of each run: mean ± '
        'standard deviation (n - 1) over the seeds. Training: mean wall time '
        'on this machine, side by side where there was more than one job; '
        'CPU: the processor time in it, which other work prolongs less. '
        "Memory: the largest peak, of the GPU or else of the run's process. "
        "Teacher: the start of its checkpoint's SHA-256, by seed."
    )
    tested = {
        r.network: r.source.network
        for r in study.runs
        if isinstance(r, Tested)
    }
    if tested:
        named = ', '.join(f'{n} of {source}' for n, source in tested.items())
        text += (
            ' Tested only, with the training and memory of the run that '
            f'trained all its networks: {named}.'
        )
    if study.baseline is None:
        return text
    several = len({*study.baselines.values()}) > 1
    return (
        f'{text} Gains: differences between runs of the same seed'
        f'{" and data" if several else ""}; p of a two-sided paired t-test, '
        'not corrected for the number of comparisons, and absent where it is '
        'not defined.'
    )


def staleness(run: Run) -> str:
    """What has changed since a result; empty if nothing has."""
    if not run.result:
        return ''
    with contextlib.suppress(CheckpointError, ConfigError, OSError):
        changed = run.changed()
        return ', '.join(f'{INPUTS[key]} changed' for key in changed)
    return ''


def listed(title: str, items: Mapping[str, str]) -> list[str]:
    if not items:
        return []
    lines = [
        f'- {name}{": " if why else ""}{why}' for name, why in items.items()
    ]
    return [f'{title}:\n\n' + '\n'.join(lines)]
