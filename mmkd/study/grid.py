"""The grid of a study: runs times options, teachers and data."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmkd.errors import ConfigError
from mmkd.utils import nearest

Options = Mapping[str, Any]
AXES = ('each', 'teachers', 'data')
"""The options of a run that multiply it."""


@dataclass(frozen=True)
class Row:
    """A network of a study.

    Attributes:
        run: The run of the file that it is of.
        label: Its name, but for the data.
        data: The name of its data; empty if that of its config.
        options: Those of a run that stands for this row alone.
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


def is_tested(options: Any) -> bool:
    """Whether they describe what is tested, but not trained by itself."""
    return isinstance(options, Mapping) and 'of' in options


# ------------------------------------------------------------------- the rows


def expand(
    runs: Mapping[str, Options], data: Mapping[str, Options], where: str
) -> dict[str, Row]:
    """The rows by name, in the order of the runs.

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
    """A row for each point of the run's grid; what is later wins."""
    plain = {k: v for k, v in options.items() if k not in AXES}
    variants = options.get('each') or {'': None}
    teachers = options.get('teachers') or ['']
    grid = itertools.product(
        variants.items(), teachers, data_of(options, data).items()
    )
    for (variant, own), teacher, (name, of_data) in grid:
        row = dict(plain)
        if of_data or own:
            of_run = plain.get('options', {})
            row['options'] = {**of_run, **(of_data or {}), **(own or {})}
        if teacher:
            row['teacher'] = teacher
        yield Row(run, joined(run, variant, teacher), name, row)


def data_of(
    options: Options, data: Mapping[str, Options]
) -> Mapping[str, Options | None]:
    """The data of a run, each with its options; those of the run win."""
    own = options.get('data') or dict.fromkeys(data) or {'': None}
    return {
        name: {**(data.get(name) or {}), **(changes or {})}
        for name, changes in own.items()
    }


def tested_rows(
    run: str,
    options: Options,
    trained: Sequence[Row],
    runs: Iterable[str],
    where: str,
) -> Iterator[Row]:
    """What is ``of`` a run is of each of its rows."""
    for source in named(options['of'], trained, runs, f'{where}.of'):
        label = run + source.label.removeprefix(source.run)
        yield Row(run, label, source.data, {**options, 'of': source.name})


def with_teacher(
    row: Row, trained: Sequence[Row], runs: Iterable[str], where: str
) -> Row:
    """The row with the name of its teacher's row: with the same data."""
    if 'teacher' not in row.options:
        return row
    name = row.options['teacher']
    found = named(name, trained, runs, f'{where}.teacher')
    fitting = [r for r in found if r.name == name] or [
        r for r in found if r.data in ('', row.data)
    ]
    if len(fitting) != 1:
        raise ConfigError(
            f'{where}: the row "{row.name}" is to have one teacher with its '
            f'data; "{name}" has {", ".join(r.name for r in found)}. Name one '
            'of these.'
        )
    return replace(row, options={**row.options, 'teacher': fitting[0].name})


def named(
    name: Any, rows: Sequence[Row], runs: Iterable[str], where: str
) -> list[Row]:
    """The one row of this name, or all of the run that has it."""
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
    """By row, the row of the baseline that has the same data."""
    found = [] if name is None else named(name, rows, runs, where)
    by_data = {row.data: row.name for row in found}
    if len(by_data) < len(found):
        raise ConfigError(
            f'{where}: "{name}" is more than one row for the same data, '
            f'{", ".join(row.name for row in found)}. Name one of these.'
        )
    return {r.name: by_data[r.data] for r in rows if r.data in by_data}


# ------------------------------------------------------------------ the file


def check_name(where: str, name: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r'\w[\w.+-]*', name):
        raise ConfigError(
            f'{where}: the name {name!r} becomes that of a folder; use a text '
            'of letters, digits, "-", "_", "." and "+".'
        )


def check_axes(
    where: str, options: Options, data: Mapping[str, Options]
) -> None:
    """Raise :class:`ConfigError` for what multiplies a run wrongly."""
    if 'each' in options:
        check_variants(f'{where}.each', options['each'])
    if 'data' in options:
        check_variants(f'{where}.data', options['data'])
        for name in options['data']:
            if data and name not in data:
                raise ConfigError(
                    f'{where}.data: the study has no data "{name}". '
                    f'{nearest(name, data)}'
                )
    if 'teacher' in options and not isinstance(options['teacher'], str):
        raise ConfigError(
            f'{where}.teacher must be the name of a run, got '
            f'{options["teacher"]!r}. For a row with each of several, write '
            '"teachers: [a, b]".'
        )
    if 'teachers' in options:
        check_teachers(f'{where}.teachers', options)


def check_variants(where: str, variants: Any) -> None:
    """They map names, which become parts of names, to options."""
    options = isinstance(variants, Mapping) and all(
        isinstance(changes or {}, Mapping) for changes in variants.values()
    )
    if not options or not variants:
        raise ConfigError(
            f'{where} must map names to options, such as '
            f'"long: {{train_cfg.max_epochs: 24}}"; got {variants!r}.'
        )
    for name in variants:
        check_name(where, name)


def check_teachers(where: str, options: Options) -> None:
    names = options['teachers']
    texts = isinstance(names, list) and all(isinstance(n, str) for n in names)
    if not texts or not names or len(set(names)) < len(names):
        raise ConfigError(
            f'{where} must be a list of different runs, such as [a, b]; got '
            f'{names!r}.'
        )
    if 'teacher' in options:
        raise ConfigError(
            f'{where}: the run has a "teacher", too. Leave one of them out.'
        )
