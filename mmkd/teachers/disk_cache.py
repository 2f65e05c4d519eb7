"""A store of tensors: bounded, shared by processes, safe in crashes."""

import io
import logging
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from mmengine.logging import print_log

from mmkd.data.checkpoint_reader import read_checkpoint

MAGIC = b'mmkd\x00\x02\r\n'
OF_ANY_VERSION = MAGIC[:5]
"""The start of the magic number of earlier and later versions, too."""
DIGEST = 16
"""The bytes of the checksum, which follows the magic number."""
CHUNK = 2**20
KEPT = 0.9
"""The share of the limit that is left when old entries are removed."""
BUCKET = re.compile('[0-9a-f]{2}')
"""The names of the folders in which the entries lie."""
ENTRY = re.compile(r'[0-9a-f]{30}|[0-9a-f]{32}\.tmp')
"""The names of entries, and of those that are being written."""


class DiskCache:
    """Keeps nested tensors under keys in a folder.

    An entry is written to a temporary file and renamed, so it is whole or
    absent. A checksum over key and content reveals an entry that was
    truncated, changed or renamed since; it counts as absent. Before a write
    exceeds the limit, the entries that were not used for longest are removed.
    Writers of all processes take turns by a lock on a file, which ends with
    its process; readers never wait.

    Nothing in the folder is followed if it is a link, and nothing is removed
    that is no entry by its name and its first bytes. Entries are read as
    weights, so they can run no code. The checksum is no signature, however:
    who may write the folder decides what is read.

    Args:
        folder: The folder, which is made if it does not exist. Processes and
            runs may share it.
        max_bytes: The limit of the sizes of all entries together.
    """

    def __init__(self, folder: str | os.PathLike, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder).expanduser(), max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._told: set[str] = set()
        with self._turn():
            # Counted anew, because a crash may have left the sum too large.
            self._note_total(self._shrink_to(max_bytes))

    def read(self, key: str) -> Any:
        """Return what was written under ``key``, on the CPU, or None.

        An entry that cannot be read, for whatever reason, counts as absent.
        """
        bucket, name = _place(key)
        path = self.folder / bucket / name
        try:
            with self._opened(bucket) as at, _reading(name, at) as file:
                content = _content(file, key, self.max_bytes)
                if content is None:
                    self._tell_once(
                        'damaged',
                        f'The cache entry {path} is damaged. It is computed '
                        'again.',
                    )
                    return None
                with suppress(OSError):  # it is not ours
                    os.utime(file.fileno())
        except OSError:
            return None
        try:
            return read_checkpoint(content, name=str(path))
        except Exception as error:  # another PyTorch may have written anything
            self._tell_once(
                'unreadable',
                f'The cache entry {path} cannot be read '
                f'({type(error).__name__}). It is computed again.',
            )
            return None

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
                self._put(*_place(key), content)
        except OSError as error:
            self._tell_once(
                'full', f'The cache {self.folder} takes no entry: {error}'
            )

    def _put(self, bucket: str, name: str, content: bytes) -> None:
        total = self._known_total() + len(content)
        if total > self.max_bytes:
            left = KEPT * self.max_bytes - len(content)
            total = self._shrink_to(max(left, 0)) + len(content)
        # Written before the entry: after a crash in between the sum is too
        # large, which only means that it is counted again sooner.
        self._note_total(total)
        (self.folder / bucket).mkdir(exist_ok=True)
        with self._opened(bucket) as folder:
            _replace(name, content, folder)

    def _note_total(self, total: int) -> None:
        with self._opened() as folder:
            _replace('total_bytes', str(total).encode(), folder)

    def _known_total(self) -> int:
        with suppress(OSError):
            with self._opened() as at, _reading('total_bytes', at) as file:
                noted = file.read(20)
            if noted.isdigit():  # else cut short by a crash
                return int(noted)
        return self._shrink_to(self.max_bytes)

    def _shrink_to(self, limit: float) -> int:
        """Remove what was not used for longest; return the bytes left.

        It is called in turn, so any temporary file has lost its writer.
        """
        found = []
        for bucket, name, status in self._entries():
            if name.endswith('.tmp'):
                self._remove(bucket, name)
            else:
                used, size = status.st_mtime_ns, status.st_size
                found.append((used, size, bucket, name))
        total = sum(size for _, size, *_ in found)
        for _, size, bucket, name in sorted(found):
            if total <= limit:
                break
            self._remove(bucket, name)
            total -= size
        return total

    def _entries(self) -> Iterator[tuple[str, str, os.stat_result]]:
        """Yield folder, name and status of what may be an entry."""
        for bucket in os.listdir(self.folder):
            if not BUCKET.fullmatch(bucket):
                continue
            with suppress(OSError), self._opened(bucket) as folder:
                for name in os.listdir(folder):
                    if not ENTRY.fullmatch(name):
                        continue
                    with suppress(OSError):
                        status = os.lstat(name, dir_fd=folder)
                        if stat.S_ISREG(status.st_mode):
                            yield bucket, name, status

    def _remove(self, bucket: str, name: str) -> None:
        """Remove an entry, unless it is a file of somebody else."""
        with suppress(OSError), self._opened(bucket) as folder:
            with _reading(name, folder) as file:
                start = file.read(len(OF_ANY_VERSION))
            if start == OF_ANY_VERSION[: len(start)]:
                os.unlink(name, dir_fd=folder)

    @contextmanager
    def _opened(self, bucket: str = '') -> Iterator[int]:
        """Open one of the folders that hold entries; a link is none."""
        flags = os.O_RDONLY | os.O_DIRECTORY | (os.O_NOFOLLOW if bucket else 0)
        folder = os.open(self.folder / bucket, flags)
        try:
            yield folder
        finally:
            os.close(folder)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        import fcntl  # which Windows does not have

        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        lock = os.open(self.folder / 'lock', flags, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _tell_once(self, kind: str, message: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            print_log(message, 'current', logging.WARNING)


def _place(key: str) -> tuple[str, str]:
    """Return the folder and the name of an entry."""
    name = fast_hash(key.encode()).hexdigest()
    return name[:2], name[2:]


def _reading(name: str, folder: int) -> IO[bytes]:
    """Open a file of a folder; raise OSError if it is a link or a device."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    file = os.fdopen(os.open(name, flags, dir_fd=folder), 'rb')
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f'{name} is no file')
    return file


def _content(file: IO[bytes], key: str, limit: int) -> io.BytesIO | None:
    """Return what follows the head of an entry; None if it is damaged.

    It is not held in memory before its checksum is known to be right.
    """
    head = file.read(len(MAGIC) + DIGEST)
    size = os.fstat(file.fileno()).st_size
    if not head.startswith(MAGIC) or size > limit:
        return None
    digest = fast_hash(key.encode())
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    if digest.digest() != head[len(MAGIC) :]:
        return None
    file.seek(len(head))
    return io.BytesIO(file.read(size))


def _replace(name: str, content: bytes, folder: int) -> None:
    """Write a file in one step."""
    temporary = f'{uuid.uuid4().hex}.tmp'
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        handle = os.open(temporary, flags, 0o666, dir_fd=folder)
        with os.fdopen(handle, 'wb') as file:
            file.write(content)
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)


def fast_hash(start: bytes) -> Any:
    """Hash with XXH3: 128 bits, as fast as memory, no use against malice."""
    return xxhash.xxh3_128(start)


def _checksum(key: str, payload: bytes | memoryview) -> bytes:
    digest = fast_hash(key.encode())
    digest.update(payload)
    return digest.digest()
