"""A lock file that names who holds it, on one machine and on several.

The operating system locks the file, and frees it with its process, however
that ends. Some file systems have no locks, or do not share them between
machines (NFS with ``nolock``). What counts there is what the file says: the
process and its machine, and by the time of its last change whether the process
is alive.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from mmengine.logging import print_log

from mmkd.errors import MMKDError

BEAT = 15
"""Seconds between two signs of life of a holder."""
SILENCE = 120
"""A holder on another machine is dead after so many seconds without one."""
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
_not_inherited: set[int] = set()
"""The descriptors of locks that forked processes do not hold."""


class Held(MMKDError):
    """A file is locked by another process.

    Attributes:
        holder: Who that is, in words.
    """

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f'{path} is locked by {holder}.')
        self.holder = holder


@contextlib.contextmanager
def locked(path: Path, *, inherited: bool = False) -> Iterator[int]:
    """Lock a file, which is created.

    Args:
        path: The file. Its folder exists.
        inherited: Whether processes that this one starts or forks hold the
            lock as well. It is then free when all of them have ended, and the
            file stays. Otherwise the file is removed in the end.

    Yields:
        The descriptor of the file.

    Raises:
        Held: If it is locked already.
        OSError: If the file cannot be written.
    """
    descriptor = _take(path)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(descriptor, stop), daemon=True)
    beat.start()
    if not inherited:
        _not_inherited.add(descriptor)
    try:
        yield descriptor
    finally:
        stop.set()
        beat.join()
        _not_inherited.discard(descriptor)
        if not inherited and _is_at(descriptor, path):
            path.unlink()
        os.close(descriptor)


def holder_of(path: Path) -> str | None:
    """Say which other process holds a lock, without touching it.

    Returns:
        None if there is none, as far as the file tells.
    """
    with contextlib.suppress(OSError), path.open() as file:
        noted = _read(file.fileno())
        own = noted.get('pid') == os.getpid()
        if own and noted['host'] == socket.gethostname():
            return None
        if noted and _is_alive(noted, file.fileno(), path.parent):
            return _in_words(noted)
    return None


# -------------------------------------------------------------------- taking


def _take(path: Path) -> int:
    """Create and lock a file, or take it over from a process that is gone."""
    while True:
        descriptor, new = _open(path)
        taken = False
        try:
            system = _lock(descriptor, path)
            if _is_at(descriptor, path):  # its holder has not removed it
                if not new:
                    _check_not_held(descriptor, path, system)
                if system or new:
                    _write(descriptor)
                    taken = True
                    return descriptor
                path.unlink()  # without the system, one that is new is ours
        finally:
            if not taken:
                os.close(descriptor)


def _open(path: Path) -> tuple[int, bool]:
    """Open a file, and say whether it is new."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        with contextlib.suppress(FileExistsError):
            new = flags | os.O_CREAT | os.O_EXCL
            return os.open(path, new, 0o666), True
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, flags), False


def _lock(descriptor: int, path: Path) -> bool:
    """Let the system lock a file; False if its file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        noted = _read(descriptor)
        holder = _in_words(noted) if noted else 'another process'
        raise Held(path, holder) from None
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True


def _check_not_held(descriptor: int, path: Path, system: bool) -> None:
    """Refuse a file whose holder may be alive, by what it says.

    Where the system has given us the lock, no process of this machine is.
    """
    noted, here = _read(descriptor), socket.gethostname()
    if not noted:  # it may be about to be written
        silent = _now(path.parent) - os.fstat(descriptor).st_mtime
        if not system and silent < SILENCE:
            raise Held(path, 'another process')
        return
    if system and noted['host'] == here:
        return
    if _is_alive(noted, descriptor, path.parent):
        raise Held(path, _in_words(noted))
    if noted['host'] != here:
        print_log(
            f'The lock {path} of {_in_words(noted)}, is taken over',
            'current',
            logging.WARNING,
        )


def _is_alive(noted: dict[str, Any], descriptor: int, folder: Path) -> bool:
    if noted['host'] == socket.gethostname():
        return noted['started'] == _started(noted['pid'])
    noted['silent'] = _now(folder) - os.fstat(descriptor).st_mtime
    return noted['silent'] < SILENCE


def _now(folder: Path) -> float:
    """Return the time of a folder's file system, which a server may keep."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _started(pid: int) -> str:
    """Say when a process of this machine was started; '' if it is gone."""
    with contextlib.suppress(OSError):
        # It comes 20th after the name in brackets, which may hold anything.
        stat = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
        return stat[19] if stat[0] not in 'ZX' else ''
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, 0)
        return 'at some time'
    return ''


# ------------------------------------------------------------------- content


def _write(descriptor: int) -> None:
    content = {
        'pid': os.getpid(),
        'host': socket.gethostname(),
        'since': datetime.now().astimezone().isoformat(timespec='seconds'),
        'started': _started(os.getpid()),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(content).encode() + b'\n', 0)


def _read(descriptor: int) -> dict[str, Any]:
    """Return what a lock file says; nothing if it is being written."""
    with contextlib.suppress(ValueError, TypeError):
        noted = json.loads(os.pread(descriptor, 10_000, 0))
        if {'pid', 'host', 'since', 'started'} <= set(noted):
            return noted
    return {}


def _in_words(noted: dict[str, Any]) -> str:
    text = f'process {noted["pid"]} on {noted["host"]}, since {noted["since"]}'
    if 'silent' in noted:
        text += f' (last sign of life {noted["silent"]:.0f} seconds ago)'
    return text


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether a file still has its name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    return False


def _beat(descriptor: int, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def _forget_in_child() -> None:
    """Close the locks in a forked process, such as a loader's worker.

    It may live on for a while after the process that holds them.
    """
    for descriptor in _not_inherited:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _not_inherited.clear()


os.register_at_fork(after_in_child=_forget_in_child)
