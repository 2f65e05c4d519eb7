"""The grid of a study: runs times options, teachers and data."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmkd.errors import ConfigError
from mmkd.utils import nearest

from .file import Options, is_tested

AXES = ('each', 'teachers', 'data')
"""The options of a run that multiply it."""


@dataclass(frozen=True)
class Row:
    """A network of a study.

    Attributes:
        run: The run of the file that it belongs to.
        label: Its name without that of its data.
        data: The name of its data; empty if they are its config's.
        options: The options of a run that stands for this row alone.
    """

    run: str
    label: str
    data: str
    options: Options

    @property
    def name(self) -> str:
        return joined(self.label, self.data)


def joined(*parts: str) -> str:
    return '-'.join(filter(None, parts))


# ------------------------------------------------------------------- the rows


def expand(
    runs: Mapping[str, Options], data: Mapping[str, Options], where: str
) -> dict[str, Row]:
    """Return the rows by name, in the order of the runs.

    A run without axes is one row, with its own name and options.

    Raises:
        ConfigError: If a teacher does not exist or is several, or if two rows
            have the same name.
    """
    of_run = {
        run: [*trained_rows(run, options, data)]
        for run, options in runs.items()
        if not is_tested(options)
    }
    trained = [*itertools.chain(*of_run.values())]
    rows: dict[str, Row] = {}
    for run, options in runs.items():
        here = f'{where}: runs.{run}'
        if is_tested(options):
            found = tested_rows(run, options, trained, runs, here)
        else:
            found = (with_teacher(r, trained, runs, here) for r in of_run[run])
        for row in found:
            if row.name in rows:
                raise ConfigError(
                    f'{here} has the row "{row.name}", but so has '
                    f'runs.{rows[row.name].run}. Rename one of them.'
                )
            rows[row.name] = row
    return rows


def trained_rows(
    run: str, options: Options, data: Mapping[str, Options]
) -> Iterator[Row]:
    """Yield a row for each point of a run's grid; later options win."""
    plain = {k: v for k, v in options.items() if k not in AXES}
    of_data = options.get('data') or dict.fromkeys(data) or {'': None}
    grid = itertools.product(
        (options.get('each') or {'': None}).items(),
        options.get('teachers') or [''],
        of_data.items(),
    )
    for (variant, own), teacher, (name, of_run) in grid:
        row = dict(plain)
        added = {**(data.get(name) or {}), **(of_run or {}), **(own or {})}
        if added:
            row['options'] = {**plain.get('options', {}), **added}
        if teacher:
            row['teacher'] = teacher
        yield Row(run, joined(run, variant, teacher), name, row)


def tested_rows(
    run: str,
    options: Options,
    trained: Sequence[Row],
    runs: Iterable[str],
    where: str,
) -> Iterator[Row]:
    """Yield a row for each row of the run that ``of`` names."""
    for source in named(options['of'], trained, runs, f'{where}.of'):
        label = run + source.label.removeprefix(source.run)
        yield Row(run, label, source.data, {**options, 'of': source.name})


def with_teacher(
    row: Row, trained: Sequence[Row], runs: Iterable[str], where: str
) -> Row:
    """Give a row the teacher that has the same data."""
    if 'teacher' not in row.options:
        return row
    name = row.options['teacher']
    found = named(name, trained, runs, f'{where}.teacher')
    fitting = [r for r in found if r.name == name] or [
        r for r in found if r.data in ('', row.data)
    ]
    if len(fitting) != 1:
        raise ConfigError(
            f'{where}: the row "{row.name}" needs one teacher with its data, '
            f'but "{name}" has {", ".join(r.name for r in found)}. Name one '
            'of these.'
        )
    return replace(row, options={**row.options, 'teacher': fitting[0].name})


def named(
    name: Any, rows: Sequence[Row], runs: Iterable[str], where: str
) -> list[Row]:
    """Return the one row of this name, or all of the run that has it."""
    found = [row for row in rows if row.name == name]
    found = found or [row for row in rows if name in (row.run, row.label)]
    if not found:
        known = {*runs, *(row.name for row in rows)}
        raise ConfigError(
            f'{where} names the run "{name}", which does not exist. '
            f'{nearest(str(name), known)}'
        )
    return found


def baselines(
    name: str | None, rows: Sequence[Row], runs: Iterable[str], where: str
) -> dict[str, str]:
    """Map each row to the row of the baseline that has its data."""
    found = [] if name is None else named(name, rows, runs, where)
    by_data = {row.data: row.name for row in found}
    if len(by_data) < len(found):
        raise ConfigError(
            f'{where}: "{name}" is more than one row for the same data, '
            f'{", ".join(row.name for row in found)}. Name one of these.'
        )
    return {r.name: by_data[r.data] for r in rows if r.data in by_data}
