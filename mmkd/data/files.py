"""Files and folders: JSON read and written, a folder listed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import COCO_REMEDY, data_error

StrPath = str | os.PathLike[str]


def read_json(path: StrPath, *, remedy: str = COCO_REMEDY) -> Any:
    """Read a JSON file.

    Raises:
        DataError: No such file, an empty one, or one that is not JSON or
            ends midway.
    """
    path = Path(path)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise data_error(path, 'a JSON file', 'nothing', remedy) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise data_error(path, 'a JSON file', f'"{reason}"', remedy) from None
    if not text.strip():
        raise data_error(path, 'a JSON file', 'an empty file', remedy)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        rest = error.doc[error.pos :].strip()
        if not rest or error.msg.startswith('Unterminated string'):
            got = f'one that ends midway, after {len(text)} bytes'
        else:
            got = f'{error.msg} at line {error.lineno}, column {error.colno}'
    except (UnicodeDecodeError, RecursionError) as error:
        got = f'bytes that are none ({error})'
    raise data_error(path, 'a JSON file', got, remedy)


def write_json(path: StrPath, content: Any) -> bool:
    """Write JSON in one step; a file that already says the same is left.

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
    """A binary file that takes its name only once it is written in full.

    On an exception, Ctrl-C included, nothing is left and what had the name
    before is untouched.
    """
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with temporary.open('wb') as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def list_folder(folder: Path) -> set[str]:
    """Names in a folder; none if it does not exist."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return set()
