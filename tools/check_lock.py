"""Fail where a package is installed that its lock does not hold.

    .venv/bin/python tools/check_lock.py

The lock is the file requirements/lock-py*.txt of the Python that runs this
script. It holds neither pip, which comes with Python, nor mmkd itself.
"""

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
UNLOCKED = ('mmkd', 'pip')


def lock_file() -> Path:
    major, minor = sys.version_info[:2]
    return ROOT / 'requirements' / f'lock-py{major}{minor}.txt'


def read_lock(path: Path) -> dict[str, Requirement]:
    """The pins of a lock by the names of their packages."""
    lines = path.read_text(encoding='utf-8').splitlines()
    pins = [Requirement(line) for line in lines if line[0] != '#']
    return {canonicalize_name(pin.name): pin for pin in pins}


def departures(
    pins: dict[str, Requirement], installed: Iterable[Distribution]
) -> list[str]:
    """How the installed packages differ from the lock, one line for each."""
    found = {canonicalize_name(d.name): d.version for d in installed}
    lines = []
    for name, version in sorted(found.items()):
        if name in UNLOCKED:
            continue
        if name not in pins:
            lines.append(f'{name} {version} is not in the lock')
        # A pin on 2.13.0 admits 2.13.0+cpu, which is a build of it.
        elif not pins[name].specifier.contains(version, prereleases=True):
            lines.append(f'{name} {version} should be {pins[name]}')
    return lines


def main() -> int:
    path = lock_file()
    if not path.exists():
        print(f'error: this Python has no lock: no {path}.', file=sys.stderr)
        return 1
    lines = departures(read_lock(path), distributions())
    if not lines:
        return 0
    print(f'error: the environment is not {path}:', file=sys.stderr)
    for line in lines:
        print(f'  {line}', file=sys.stderr)
    print(
        'Add what is missing to a file in requirements/ and call "make '
        'lock"; or remove .venv and call "make install".',
        file=sys.stderr,
    )
    return 1


if __name__ == '__main__':
    sys.exit(main())
