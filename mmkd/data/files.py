"""Files and folders: read and write JSON, and look for files."""

import difflib
import json
import os
import re
import reprlib
import secrets
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .errors import COCO_REMEDY, data_error, some

StrPath = str | os.PathLike[str]


class _Limited(reprlib.Repr):
    """Show only the beginning of what is long, and any number."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() < 200 else 'a huge number'


LIMITED = _Limited()


def read_json(path: StrPath, *, remedy: str = COCO_REMEDY) -> Any:
    """Read a JSON file.

    Raises:
        DataError: The file is missing, empty, not JSON, or ends midway, or
            holds what Python cannot read (lists without end, numbers of
            more than 4300 digits).
    """
    path = Path(path)
    try:
        text = path.read_bytes()
        return json.loads(text)
    except FileNotFoundError:
        got = 'nothing'
    except OSError as error:
        got = f'"{error.strerror or error}"'
    except json.JSONDecodeError as error:
        rest = error.doc[error.pos :].strip()
        got = f'{error.msg} at line {error.lineno}, column {error.colno}'
        if not text.strip():
            got = 'an empty file'
        elif not rest or error.msg.startswith('Unterminated string'):
            got = f'one that ends midway, after {len(text)} bytes'
    except UnicodeDecodeError as error:
        got = f'bytes that are not JSON ({error})'
    except RecursionError:
        got = 'bytes that are not JSON (values too deep in one another)'
    except ValueError:  # Python's limit of digits
        got = f'a number of more than {sys.get_int_max_str_digits():,} digits'
    raise data_error(path, 'a JSON file', got, remedy)


def real_path(path: StrPath) -> Path:
    """Return the absolute path without links, whether or not it exists.

    ``Path.resolve`` raises a RuntimeError for links that lead in a circle.
    """
    return Path(os.path.realpath(os.path.expanduser(path)))


def wrong_path(path: StrPath) -> str:
    """Say what there is in place of a file that is missing."""
    return 'is a folder' if Path(path).is_dir() else 'does not exist'


def path_hint(path: StrPath) -> str:
    """Say which name may be meant where there is no such file or folder.

    Returns:
        A sentence and a space; empty where nothing is alike.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.is_file())
        return f'It holds {some(names)}. ' if names else 'It holds no files. '
    parent, missing = path.absolute().parent, path.absolute().name
    while not parent.exists():
        parent, missing = parent.parent, parent.name
    if not parent.is_dir():
        return f'{parent} is a file, and no folder. '
    close = difflib.get_close_matches(missing, os.listdir(parent), n=1)
    if not close:
        return f'{parent} has no "{missing}". '
    parts = [close[0] if part == missing else part for part in path.parts]
    return f'Did you mean "{Path(*parts)}"? '


def read_bytes(path: StrPath, most: int, expected: str, remedy: str) -> bytes:
    """Read a file that has to be small.

    Raises:
        DataError: It cannot be read, or has more than ``most`` bytes.
    """
    try:
        with open(path, 'rb') as file:
            content = file.read(most + 1)
    except FileNotFoundError:
        got = 'nothing'
    except OSError as error:
        got = f'"{error.strerror or error}"'
    else:
        if len(content) <= most:
            return content
        got = f'more than {most:,} bytes'
    raise data_error(path, expected, got, remedy)


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a number that can be computed with.

    ``true`` is none, though Python takes it for 1, and neither are NaN,
    infinity, and what overflows when it is squared.
    """
    return type(value) in (int, float) and -1e15 < value < 1e15  # type: ignore[operator]


def shown(value: object, length: int = 80) -> str:
    """Show a value of a file in a message, however large it is."""
    text = LIMITED.repr(value)
    return text if len(text) <= length else f'{text[:length]}…'


def write_json(path: StrPath, content: Any) -> bool:
    """Write JSON in one step, unless the file already holds the same.

    Returns:
        Whether the file was written.
    """
    path = Path(path)
    text = json.dumps(content, separators=(',', ':')) + '\n'
    if path.is_file() and path.read_text(encoding='utf-8') == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())
    return True


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that gets its name once it is written in full.

    After an exception, Ctrl-C included, nothing of it is left, and a file
    that had the name before is untouched.
    """
    # It is created, and never opened through a link.
    with replacement(path) as temporary, temporary.open('xb') as file:
        yield file


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Give the name of a file that takes the place of another at the end.

    No other process has the same name for it, on this machine or another. What
    was written is on the disk before it gets the name. After an exception
    nothing of it is left, and a file that had the name before is untouched.

    Args:
        path: The file that is replaced, or created.
    """
    # Names may have 255 bytes, of which these take up to 98.
    host = socket.gethostname()[:64]
    own = f'{os.getpid()}-{secrets.token_hex(4)}@{host}.tmp'
    short = path.name.encode()[:150].decode(errors='ignore')
    temporary = path.with_name(f'.{short}.{own}')
    try:
        yield temporary
        with temporary.open('rb') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


LEFT = re.compile(r'\..+\.(\d+)-[0-9a-f]{8}@(.*)\.tmp')
"""The name of a :func:`replacement`."""
FORGOTTEN = 24 * 3600
"""Seconds after which that of another machine is given up."""


def remove_leftovers(folder: Path) -> None:
    """Remove the replacements that processes did not finish before they died.

    Those of processes that are alive stay, and so do those of other machines
    that are less than a day old.

    Args:
        folder: Where they are, or in the folders within.
    """
    for path in (*folder.glob('.*.tmp'), *folder.glob('*/.*.tmp')):
        found = LEFT.fullmatch(path.name)
        with suppress(OSError):
            if found and not _may_be_written(int(found[1]), found[2], path):
                path.unlink()


def _may_be_written(pid: int, host: str, path: Path) -> bool:
    if host != socket.gethostname()[:64]:
        return time.time() - path.stat().st_mtime < FORGOTTEN
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def check_files(
    root: Path, names: Iterable[str], source: object, remedy: str
) -> None:
    """Check that files exist; each folder is listed once, no file is opened.

    Args:
        root: The folder that the names are relative to.
        names: The files, with ``/`` between folders.
        source: What names them, for the error.
        remedy: The last sentence of the error.

    Raises:
        DataError: Files are missing; it says how many, and names the first.
    """
    listed: dict[str, set[str]] = {}
    missing = []
    for name in names:
        folder, _, base = name.rpartition('/')
        if folder not in listed:
            place = os.path.join(root, folder)
            there = os.path.isdir(place)  # False for what cannot be a path
            listed[folder] = set(os.listdir(place) if there else ())
        if base not in listed[folder]:
            missing.append(name)
    if missing:
        expected = f'every file that {source} names'
        got = f'{len(missing)} missing: {some(missing)}'
        raise data_error(root, expected, got, remedy)
