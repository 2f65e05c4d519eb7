"""A store of tensors: bounded, shared by processes, safe in crashes."""

import io
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import xxhash
from mmengine.logging import print_log

MAGIC = b'mmkd\x00\x02\r\n'
DIGEST = 16
"""The bytes of the checksum, which follows the magic number."""
KEPT = 0.9
"""The share of the limit that is left when old entries are removed."""


class DiskCache:
    """Keeps nested tensors under keys in a folder.

    An entry is written to a temporary file and renamed, so it is whole or
    absent. A checksum over key and content reveals an entry that was
    truncated, changed or renamed since; it counts as absent. Before a write
    exceeds the limit, the entries that were not used for longest are removed.
    Writers of all processes take turns by a lock on a file, which ends with
    its process; readers never wait.

    Args:
        folder: The folder, which is made if it does not exist. Processes and
            runs may share it.
        max_bytes: The limit of the sizes of all entries together.
    """

    def __init__(self, folder: str | os.PathLike, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder).expanduser(), max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._total = self.folder / 'total_bytes'
        self._told: set[str] = set()
        with self._turn():
            # Counted anew, because a crash may have left the sum too large.
            self._total.write_text(str(self._shrink_to(max_bytes)))

    def read(self, key: str) -> Any:
        """Return what was written under ``key``, on the CPU, or None.

        An entry that cannot be read, for whatever reason, counts as absent.
        """
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        start = len(MAGIC) + DIGEST
        payload = memoryview(content)[start:]
        if content[:start] != MAGIC + _checksum(key, payload):
            self._tell_once(
                'damaged',
                f'The cache entry {path} is damaged. It is computed again.',
            )
            return None
        try:
            value = torch.load(io.BytesIO(payload), weights_only=True)
        except Exception as error:  # another PyTorch may have written anything
            self._tell_once(
                'unreadable',
                f'The cache entry {path} cannot be read '
                f'({type(error).__name__}). It is computed again.',
            )
            return None
        with suppress(OSError):  # removed in the meantime, or not ours
            os.utime(path)
        return value

    def write(self, key: str, value: Any) -> None:
        """Keep nested tensors (lists, tuples and dicts of them).

        Anything else may be absent when it is read. If the disk is full or
        the folder cannot be written, the entry is left out, with one warning.
        """
        buffer = io.BytesIO()
        torch.save(value, buffer)
        payload = buffer.getvalue()
        content = MAGIC + _checksum(key, payload) + payload
        if len(content) > self.max_bytes:
            self._tell_once(
                'large',
                f'An entry of {len(content):,} bytes is larger than the cache '
                f'{self.folder} may be ({self.max_bytes:,}), and is left '
                'out. Raise max_gib.',
            )
            return
        try:
            with self._turn():
                self._put(self._path(key), content)
        except OSError as error:
            self._tell_once(
                'full', f'The cache {self.folder} takes no entry: {error}'
            )

    def _put(self, path: Path, content: bytes) -> None:
        total = self._known_total() + len(content)
        if total > self.max_bytes:
            left = KEPT * self.max_bytes - len(content)
            total = self._shrink_to(max(left, 0)) + len(content)
        # Written before the entry: after a crash in between the sum is too
        # large, which only means that it is counted again sooner.
        self._total.write_text(str(total))
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f'{uuid.uuid4().hex}.tmp')
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _known_total(self) -> int:
        try:
            return int(self._total.read_text())
        except (OSError, ValueError):  # cut short by a crash
            return self._shrink_to(self.max_bytes)

    def _shrink_to(self, limit: float) -> int:
        """Remove what was not used for longest; return the bytes left.

        It is called in turn, so any temporary file has lost its writer.
        """
        found = []
        for path in self.folder.glob('??/*'):
            if path.suffix == '.tmp':
                path.unlink(missing_ok=True)
                continue
            with suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= limit:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _path(self, key: str) -> Path:
        name = fast_hash(key.encode()).hexdigest()
        return self.folder / name[:2] / name[2:]

    @contextmanager
    def _turn(self) -> Iterator[None]:
        import fcntl  # which Windows does not have

        with open(self.folder / 'lock', 'w') as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _tell_once(self, kind: str, message: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            print_log(message, 'current', logging.WARNING)


def fast_hash(start: bytes) -> Any:
    """Hash with XXH3: 128 bits, as fast as memory, no use against malice."""
    return xxhash.xxh3_128(start)


def _checksum(key: str, payload: bytes | memoryview) -> bytes:
    digest = fast_hash(key.encode())
    digest.update(payload)
    return digest.digest()
