"""Write the tables of methods in README.md and the docs.

Papers are read from "Source:" in the docstrings, needs and official code from
the classes; the configs are all those below configs/ that name the method.

Examples:
    python tools/method_table.py
    python tools/method_table.py --check  # status 1 if a table is out of date
"""

import argparse
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmkd import methods
from mmkd.core.method import Method
from mmkd.detectors import heads
from mmkd.methods.class_logits import CLASS_LOGITS
from mmkd.teachers.view import DENSE

ROOT = Path(__file__).resolve().parents[1]
BEGIN = '<!-- written by tools/method_table.py -->'
END = '<!-- end of the methods -->'
SOURCE = re.compile(
    r'Source: (?P<authors>[^"]+), "(?P<title>[^"]+)", '
    r'(?P<venue>[^,]*\d{4}), (?P<url>https://\S+?)[.,;:]?(?: |$)'
)
IN_WORDS = {CLASS_LOGITS: 'class logits', DENSE: 'predictions per prior'}
MOST = 4
"""How many configs of a folder are named one by one."""


@dataclass(frozen=True)
class Paper:
    """Where a method was published."""

    authors: str
    title: str
    venue: str
    url: str


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--check', action='store_true', help='only say if it is out of date'
    )
    args = parser.parse_args()
    outdated = False
    for name, table in TABLES.items():
        path = ROOT / name
        before = path.read_text()
        after = updated(before, table())
        outdated |= after != before
        if not args.check:
            path.write_text(after)
    return int(args.check and outdated)


def updated(text: str, content: str) -> str:
    """The text with the table between the two marks."""
    pattern = f'{re.escape(BEGIN)}.*?{re.escape(END)}'
    replacement = f'{BEGIN}\n\n{content}\n\n{END}'
    result, found = re.subn(
        pattern, lambda _: replacement, text, flags=re.DOTALL
    )
    if found != 1:
        raise SystemExit(f'the page must hold {BEGIN} … {END} once')
    return result


# -------------------------------------------------------------- the tables


def short_table() -> str:
    """For the README: what a method needs, and where it is."""
    users = users_of_types()
    rows = [('method', 'paper', 'reads', 'labels', 'config')]
    for cls in classes():
        paper = paper_of(cls)
        name = link(f'`{cls.__name__}`', file_of(cls))
        configs = users.get(f'mmkd.{cls.__name__}', ())
        first = min(configs, key=_simplicity, default=None)
        source = f'[{paper.authors}, {paper.venue}]({paper.url})'
        config = link(first.stem, first) if first else ''
        rows.append((name, source, reads(cls), labels(cls), config))
    return markdown(rows)


def long_table() -> str:
    """For the docs: titles, and every file."""
    users = users_of_types()
    rows = [('method', 'paper', 'configs', 'code and test')]
    for cls in classes():
        name, code, paper = f'mmkd.{cls.__name__}', file_of(cls), paper_of(cls)
        rows.append(
            (
                f'`{cls.__name__}`',
                f'{paper.authors}, [{paper.title}]({paper.url}), '
                f'{paper.venue}',
                ', '.join(named(users.get(name, ()))) or 'none',
                ', '.join(
                    f'`{Path(*path.parts[1:])}`'
                    for path in (code, *tests_of(name, code))
                ),
            )
        )
    return markdown(rows)


def official_table() -> str:
    """For the docs: each method beside its authors' code."""
    header = 'method, official code, compared by, options of that code, '
    header += 'defaults that differ, cited AP (config), what still differs'
    rows: list[Sequence[str]] = [header.split(', ')]
    for cls in classes():
        for official in cls.official:  # type: ignore[attr-defined]
            defaults = defaults_of(cls)
            other = {
                key: defaults[key]
                for key, value in official.options.items()
                if key in defaults and defaults[key] != value
            }
            cited = f'{official.ap} (`{official.config}`)'
            rows.append(
                (
                    f'`{cls.__name__}`',
                    official.code,
                    f'`{official.compared.removeprefix("tests/")}`',
                    shown(official.options) or 'the defaults',
                    shown(other) or 'none',
                    cited if official.ap else 'none',
                    official.differs or 'nothing known',
                )
            )
        if not cls.official:  # type: ignore[attr-defined]
            rows.append((f'`{cls.__name__}`', 'none for detection', *[''] * 5))
    return markdown(rows)


def shown(options: Mapping[str, Any]) -> str:
    return ', '.join(f'`{key}={value!r}`' for key, value in options.items())


def defaults_of(cls: type) -> dict[str, Any]:
    """The defaults of all options, those of base classes included."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if '__init__' in vars(base):
            for name, parameter in inspect.signature(
                vars(base)['__init__']
            ).parameters.items():
                if parameter.default is not parameter.empty:
                    found[name] = parameter.default
    return found


TABLES: Mapping[str, Callable[[], str]] = {
    'README.md': short_table,
    'docs/methods.md': long_table,
    'docs/official_code.md': official_table,
}


def classes() -> list[type]:
    """Methods with a teacher first, then those of peers, then heads."""
    found = {getattr(methods, name) for name in methods.__all__} - {Method}
    ordered = sorted(
        found, key=lambda c: (c.learns_from != 'teacher', c.__name__.lower())
    )
    return ordered + [getattr(heads, name) for name in heads.__all__]


def reads(cls: type) -> str:
    """What a class reads of its teacher or its peers."""
    if not issubclass(cls, Method):
        return 'a head, for plain training too'
    if cls.learns_from == 'peers':
        return 'peers'
    return ', '.join(
        IN_WORDS.get(need) or str(need)
        for need in cls.needs  # type: ignore[arg-type]
    )


def labels(cls: type) -> str:
    return 'yes' if getattr(cls, 'needs_labels', True) else 'no'


def paper_of(cls: type) -> Paper:
    """The first source of a docstring."""
    text = ' '.join((cls.__doc__ or '').split())
    found = SOURCE.search(text)
    if found is None:
        raise SystemExit(
            f"{cls.__name__}: the docstring must hold 'Source: Authors, "
            f'"Title", venue and year, URL\''
        )
    authors = found['authors'].split(', ')
    shown = {1: authors[0], 2: ' & '.join(authors)}.get(
        len(authors), f'{authors[0]} et al.'
    )
    return Paper(shown, found['title'], found['venue'], found['url'])


def file_of(cls: type) -> Path:
    return Path(inspect.getfile(cls)).relative_to(ROOT)


# --------------------------------------------------------------------- configs


@functools.cache
def users_of_types() -> dict[str, list[Path]]:
    """All configs that name a class of mmkd, by that name."""
    users: dict[str, list[Path]] = {}
    for path in sorted((ROOT / 'configs').rglob('*.py'), key=_depth):
        if '_base_' not in path.parts:
            for name in set(types_in(Config.fromfile(path).to_dict())):
                users.setdefault(name, []).append(path.relative_to(ROOT))
    return users


def types_in(value: Any) -> Iterator[str]:
    """Every ``type`` in a config."""
    if isinstance(value, Mapping):
        if isinstance(value.get('type'), str):
            yield value['type']
        for part in value.values():
            yield from types_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from types_in(part)


def named(paths: Iterable[Path]) -> list[str]:
    """One by one, but a folder of many at once; those for COCO first."""
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    names = []
    for folder, members in folders.items():
        if len(members) > MOST and folder != Path('configs'):
            names.append(f'`{folder.relative_to("configs")}/`')
        else:
            names += [f'`{p.relative_to("configs")}`' for p in members]
    return names


def _depth(path: Path) -> tuple[int, Path]:
    return len(path.parts), path


def _simplicity(path: Path) -> tuple[int, int]:
    return len(path.parts), len(path.stem)


def tests_of(name: str, code: Path) -> list[Path]:
    """The test of the same name, or else those that name the class."""
    folder = Path('tests', *code.parts[1:-1])
    own = folder / f'test_{code.name}'
    if (ROOT / own).exists():
        return [own]
    found = [
        path.relative_to(ROOT)
        for path in sorted((ROOT / folder).glob('*.py'))
        if name in path.read_text()
    ]
    if not found:
        raise SystemExit(f'no test in {folder} names {name}')
    return found


# -------------------------------------------------------------------- Markdown


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its header."""
    header, *body = rows
    lines = [header, ('---',) * len(header), *body]
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in lines)


def link(text: str, target: Path) -> str:
    return f'[{text}]({target.as_posix()})'


if __name__ == '__main__':
    sys.exit(main())
