"""What no reader may do, whatever it reads."""

import contextlib
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

MEMORY = 2 << 30
"""More bytes than this a reader may not take on top of what is there."""
SECONDS = 30
"""Of the processor's time; what is read here takes a fraction of one."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
NOWHERE = Path(os.devnull)
CHANGES = (
    *('os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.link'),
    *('os.symlink', 'os.truncate', 'os.chmod', 'os.chown'),
)
STARTS = ('os.system', 'subprocess.Popen', 'os.exec', 'os.posix_spawn')
_watched: list[tuple[Path, list[str]]] = []


class TooLong(BaseException):
    """A reader computes and computes."""


def _audit(event: str, arguments: tuple) -> None:
    if not _watched:
        return
    folder, found = _watched[-1]
    if event in STARTS:
        found.append(f'{event} {arguments}')
    paths = arguments[:2] if event in CHANGES else ()
    if event == 'open' and arguments[2] & WRITES:
        paths = arguments[:1]
    for path in paths:
        if isinstance(path, str | bytes | Path):
            real = Path(os.path.abspath(os.fsdecode(path)))
            allowed = real.is_relative_to(folder) or real == NOWHERE
            if not allowed and real.suffix != '.pyc':
                found.append(f'{event} {real}')


sys.addaudithook(_audit)


@contextlib.contextmanager
def bounded(folder: Path) -> Iterator[None]:
    """Let what is read write below a folder only, briefly and with little.

    Raises:
        AssertionError: If it has written elsewhere, or started a process.
        MemoryError: If it asks for too much.
        TooLong: If it takes too long.
    """

    def stop(*_: object) -> None:
        raise TooLong

    size = int(Path('/proc/self/statm').read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = size * resource.getpagesize() + MEMORY
    found: list[str] = []
    former = signal.signal(signal.SIGVTALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    _watched.append((folder.resolve(), found))
    working = os.getcwd()
    os.chdir(folder)  # for names without a folder
    temporary, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        _watched.pop()
        tempfile.tempdir = temporary
        os.chdir(working)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, former)
    assert not found, found
