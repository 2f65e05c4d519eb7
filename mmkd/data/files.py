"""Files and folders: read and write JSON, and look for files."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import COCO_REMEDY, data_error, some

StrPath = str | os.PathLike[str]


def read_json(path: StrPath, *, remedy: str = COCO_REMEDY) -> Any:
    """Read a JSON file.

    Raises:
        DataError: The file is missing, empty, not JSON, or ends midway.
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
    except (UnicodeDecodeError, RecursionError) as error:
        got = f'bytes that are not JSON ({error})'
    raise data_error(path, 'a JSON file', got, remedy)


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
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with temporary.open('wb') as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
            place = root / folder
            listed[folder] = set(os.listdir(place) if place.is_dir() else ())
        if base not in listed[folder]:
            missing.append(name)
    if missing:
        expected = f'every file that {source} names'
        got = f'{len(missing)} missing: {some(missing)}'
        raise data_error(root, expected, got, remedy)
