"""Write the README's table of methods: paper, code, configs, test.

Papers are read from the docstrings' "Source:", configs are all those under
configs/ that name the method.

Examples:
    python tools/method_table.py
    python tools/method_table.py --check  # exit status 1 if it has to be
"""

import argparse
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmkd import methods
from mmkd.core.method import Method
from mmkd.detectors import heads

ROOT = Path(__file__).resolve().parents[1]
BEGIN = '<!-- written by tools/method_table.py -->'
END = '<!-- end of the methods -->'
HEADER = ('method', 'paper', 'code', 'configs', 'test')
SOURCE = re.compile(
    r'Source: (?P<authors>[^"]+), "(?P<title>[^"]+)", '
    r'(?P<venue>[^,]*\d{4}), (?P<url>https://\S+?)[.,;:]?(?: |$)'
)
MOST = 4
"""Configs of a folder that are named one by one."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--check', action='store_true', help='only say if it is out of date'
    )
    args = parser.parse_args()
    readme = ROOT / 'README.md'
    before = readme.read_text()
    after = updated(before, table())
    if args.check:
        return int(after != before)
    readme.write_text(after)
    return 0


def updated(text: str, content: str) -> str:
    """The text with the table between the two marks."""
    pattern = f'{re.escape(BEGIN)}.*?{re.escape(END)}'
    replacement = f'{BEGIN}\n{content}\n{END}'
    result, found = re.subn(
        pattern, lambda _: replacement, text, flags=re.DOTALL
    )
    if found != 1:
        raise SystemExit(f'the README must hold {BEGIN} … {END} once')
    return result


def table() -> str:
    """In Markdown: methods with a teacher first, then those of peers."""
    users = users_of_types()
    classes = [getattr(methods, name) for name in methods.__all__]
    classes = [c for c in classes if c is not Method]
    classes.sort(key=lambda c: (c.needs != 'teacher', c.__name__.lower()))
    classes += [getattr(heads, name) for name in heads.__all__]
    rows = [HEADER, ('---',) * len(HEADER)]
    rows += [row(cls, users) for cls in classes]
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in rows)


def row(cls: type, users: Mapping[str, Sequence[Path]]) -> Sequence[str]:
    name = f'mmkd.{cls.__name__}'
    code = Path(inspect.getfile(cls)).relative_to(ROOT)
    return (
        f'`{name}`',
        paper(cls),
        link(code.stem, code),
        ', '.join(config_links(users.get(name, ()))) or 'none',
        ', '.join(link(path.stem, path) for path in tests_of(name, code)),
    )


def paper(cls: type) -> str:
    """The first source of a docstring, as a link."""
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
    return f'{shown}, [{found["title"]}]({found["url"]}), {found["venue"]}'


def users_of_types() -> dict[str, list[Path]]:
    """All configs that name a class of mmkd, by that name."""
    users: dict[str, list[Path]] = {}
    for path in sorted((ROOT / 'configs').rglob('*.py')):
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


def config_links(paths: Iterable[Path]) -> list[str]:
    """One by one, but a folder of many at once; those for COCO first."""
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    links = []
    for folder, members in sorted(folders.items(), key=_depth):
        if len(members) > MOST and folder != Path('configs'):
            links.append(link(name_of(folder), folder))
        else:
            links += [link(name_of(path), path) for path in members]
    return links


def _depth(item: tuple[Path, Any]) -> tuple[int, Path]:
    return len(item[0].parts), item[0]


def name_of(path: Path) -> str:
    return path.relative_to('configs').with_suffix('').as_posix()


def tests_of(name: str, code: Path) -> list[Path]:
    """The test of the same name, or else those that name the class."""
    folder = ROOT / 'tests' / code.parent.name
    own = folder / f'test_{code.name}'
    if own.exists():
        return [own.relative_to(ROOT)]
    found = [p for p in sorted(folder.glob('*.py')) if name in p.read_text()]
    if not found:
        raise SystemExit(f'no test in {folder} names {name}')
    return [path.relative_to(ROOT) for path in found]


def link(text: str, target: Path) -> str:
    return f'[{text}]({target.as_posix()})'


if __name__ == '__main__':
    sys.exit(main())
