"""A lock file: who holds it, and whether that process is alive."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys

import pytest

from mmkd.data import lock
from mmkd.data.lock import Held, holder_of, locked

HOLD = """
import os, sys
from pathlib import Path
from mmkd.data.lock import locked
with locked(Path(sys.argv[1])):
    child = os.fork()
    if not child:
        sys.stdin.read()  # a worker that outlives its parent for a while
        os._exit(0)
    print(child, flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def other_process(path):
    """Another process that holds a lock, and has forked a worker."""
    with subprocess.Popen(
        [sys.executable, '-c', HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        yield process
        process.kill()


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'lock'


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks."""

    def flock(*_):
        raise OSError(errno.ENOSYS, 'Function not implemented')

    monkeypatch.setattr(fcntl, 'flock', flock)


def note(path, silent=0.0, **changes):
    """Leave the lock file of another holder."""
    with locked(path):
        noted = json.loads(path.read_text())
    path.write_text(json.dumps(noted | changes))
    seconds = path.stat().st_mtime - silent
    os.utime(path, (seconds, seconds))


def test_it_is_held_once_and_leaves_nothing(path):
    with locked(path):
        assert holder_of(path) is None  # nobody else
        refused = pytest.raises(Held, match=f'by process {os.getpid()} on ')
        with refused, locked(path):
            pass
        assert path.exists()
    assert not path.exists()
    with locked(path):
        pass


@pytest.mark.parametrize('supported', [True, False])
def test_another_process(path, supported, request):
    """It is named, and once it is killed nobody waits for its workers."""
    with other_process(path) as process:
        if not supported:
            request.getfixturevalue('no_locks')
        named = f'process {process.pid} on {socket.gethostname()}, since 20'
        assert holder_of(path).startswith(named)
        with pytest.raises(Held, match=named), locked(path):
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert holder_of(path) is None
        with locked(path):
            assert json.loads(path.read_text())['pid'] == os.getpid()


def test_a_worker_that_lives_on_does_not_hold_it(path):
    with locked(path):
        fork = multiprocessing.get_context('fork')
        ready = fork.Event()
        worker = fork.Process(target=wait, args=(ready,), daemon=True)
        worker.start()
        ready.wait()
    with locked(path):
        worker.kill()


def wait(ready):
    ready.set()
    signal.pause()


def test_processes_that_inherit_it_hold_it(path):
    with locked(path, inherited=True) as descriptor:
        child = subprocess.Popen(
            [sys.executable, '-c', 'input()'],
            stdin=subprocess.PIPE,
            pass_fds=[descriptor],
        )
    with pytest.raises(Held), locked(path, inherited=True):
        pass
    child.kill()
    child.wait()
    with locked(path, inherited=True):
        pass


@pytest.mark.parametrize('supported', [True, False])
def test_a_process_on_another_machine(path, supported, request):
    """It counts as alive as long as it changes the file now and then."""
    if not supported:
        request.getfixturevalue('no_locks')
    note(path, silent=lock.SILENCE - 20, host='elsewhere', pid=7)
    named = r'process 7 on elsewhere, since .* \(last sign of life 10\d sec'
    with pytest.raises(Held, match=named), locked(path):
        pass
    assert holder_of(path).startswith('process 7 on elsewhere')
    note_silence = path.stat().st_mtime - 30
    os.utime(path, (note_silence, note_silence))
    assert holder_of(path) is None
    with locked(path):
        assert json.loads(path.read_text())['pid'] == os.getpid()


@pytest.mark.usefixtures('no_locks')
def test_a_number_that_another_process_has_got(path):
    """Where the system has no locks, the start of the process is compared."""
    note(path, pid=os.getppid(), started='long ago')
    with locked(path):
        pass


@pytest.mark.usefixtures('no_locks')
def test_a_file_that_is_about_to_be_written(path):
    path.touch()
    with pytest.raises(Held, match='by another process'), locked(path):
        pass


@pytest.mark.parametrize('content', ['', 'nonsense', '[1]', '{"pid": 3}'])
def test_a_broken_file_is_taken_over(path, content):
    path.write_text(content)
    assert holder_of(path) is None
    with locked(path):
        pass


def test_signs_of_life(path, monkeypatch):
    monkeypatch.setattr(lock, 'BEAT', 0.01)
    with locked(path):
        os.utime(path, (0, 0))
        while path.stat().st_mtime == 0:
            pass


def test_a_link_is_not_followed(path, tmp_path):
    target = tmp_path / 'precious'
    target.write_text('content')
    path.symlink_to(target)
    with pytest.raises(OSError, match='symbolic'), locked(path):
        pass
    assert target.read_text() == 'content'


def test_a_file_that_somebody_removed(path):
    """It is not the one of the next holder, which stays."""
    with locked(path):
        path.unlink()
        with locked(path):
            inner = path.stat().st_ino
    assert not path.exists()
    assert inner
