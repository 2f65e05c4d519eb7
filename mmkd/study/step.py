"""A step of a run: a command in a process of its own, and what it costs."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mmkd import data
from mmkd.data import lock as lock_file
from mmkd.data.files import write_text
from mmkd.errors import MMKDError

LIBC = ctypes.CDLL(None)
STOPPED_WITHIN = 60
"""Seconds that a process has to save a checkpoint before it is killed."""
NOTED_EVERY = 10
"""At most so many seconds of a killed process's CPU time are lost."""


@dataclass
class Step:
    """The training or the test of a run.

    Attributes:
        folder: Holds ``<name>.json``, the notes about the step, and
            ``<name>.txt``, what it prints.
        command: The arguments of Python.
        inputs: Hashes of what the result depends on.
    """

    folder: Path
    name: str
    command: list[str]
    inputs: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    peak: float = 0.0
    """Resident memory in MiB."""

    @property
    def log(self) -> Path:
        return self.folder / f'{self.name}.txt'

    @property
    def notes(self) -> Path:
        return self.folder / f'{self.name}.json'

    @property
    def state(self) -> dict[str, Any]:
        """What the notes say; empty before the step was begun."""
        return read_json(self.notes)

    def note(self, **changes: Any) -> None:
        write_json(self.notes, self.state | changes)

    def start(self, lock: int) -> None:
        """Start the process, which inherits the lock of the work dir."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.note(
            fingerprint=self.inputs, begun=time.time(), running_cpu_seconds=0
        )
        self.started = time.monotonic()
        with self.log.open('ab') as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock],
                # Ctrl-C reaches this process alone, which stops them.
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def ended(self) -> bool:
        """Return whether the process has ended; then its costs are noted."""
        assert self.process
        if self.process.returncode is not None:
            return True
        self.peak = max(self.peak, peak_resident(self.process.pid))
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not pid:
            if time.time() - self.notes.stat().st_mtime > NOTED_EVERY:
                cpu = cpu_of_session(self.process.pid)
                self.note(running_cpu_seconds=round(cpu, 1), **self._peak())
            return False
        self.process.returncode = os.waitstatus_to_exitcode(status)
        finished = {} if self.process.returncode else {'finished': now()}
        self._count(
            time.monotonic() - self.started,
            usage.ru_utime + usage.ru_stime,
            **self._peak(),
            **finished,
        )
        return True

    def count_lost_time(self) -> None:
        """Count the time of a process that was killed with its study."""
        noted = self.state
        if noted.get('begun') is not None:
            wall = 0.0
            with contextlib.suppress(FileNotFoundError):  # it never started
                last_words = self.log.stat().st_mtime
                wall = max(last_words - noted['begun'], 0)
            self._count(wall, noted.get('running_cpu_seconds', 0))

    def _count(self, wall: float, cpu: float, **others: Any) -> None:
        """Add the time of a process that has ended, all in one note."""
        old = self.state
        self.note(
            begun=None,
            wall_seconds=round(old.get('wall_seconds', 0) + wall, 1),
            cpu_seconds=round(old.get('cpu_seconds', 0) + cpu, 1),
            **others,
        )

    def _peak(self) -> dict[str, float]:
        return {
            'peak_mib': round(max(self.state.get('peak_mib', 0), self.peak), 1)
        }


def stop(steps: Sequence[Step]) -> None:
    """End processes; trainings save a checkpoint at the next iteration."""
    running = [step for step in steps if not step.ended()]
    for step in running:
        assert step.process
        step.process.terminate()
    deadline = time.monotonic() + STOPPED_WITHIN
    for step in running:
        while not step.ended():
            assert step.process
            if time.monotonic() > deadline:
                step.process.kill()
            time.sleep(0.05)


def _end_with_parent() -> None:
    """Let a killed parent take this process along (Linux)."""
    with contextlib.suppress(AttributeError):
        LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def peak_resident(pid: int | str = 'self') -> float:
    """Return a process's peak of memory in MiB; 0 if it has ended (Linux).

    This is not ``ru_maxrss``, where a child starts with its parent's peak.
    """
    with contextlib.suppress(OSError):
        for line in Path(f'/proc/{pid}/status').read_text().splitlines():
            if line.startswith('VmHWM:'):
                return int(line.split()[1]) / 2**10
    return 0.0


def cpu_of_session(leader: int) -> float:
    """Return the CPU seconds of all processes of a session (Linux).

    Its leader is a step's process, and the workers that load the data of that
    process are in it, too.
    """
    ticks = 0
    for path in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            # After the name in brackets, which may hold anything, come state,
            # parent, group, session, ..., and from the 12th field on the time
            # of the process and of its ended children, in user and system
            # mode.
            fields = path.read_text().rpartition(')')[2].split()
            if int(fields[3]) == leader:
                ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf('SC_CLK_TCK')


# ------------------------------------------------------------------- folders


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keep a folder to one process and to the steps that inherit the lock.

    Yields:
        The file descriptor of the lock.

    Raises:
        MMKDError: If another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            lock = lock_file.locked(folder / '.lock', inherited=True)
            yield stack.enter_context(lock)
        except lock_file.Held as held:
            raise MMKDError(
                f'another process, or a training that it left behind, is at '
                f'work in {folder}: {held.holder}. End it, or choose another '
                'work dir.'
            ) from None


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec='seconds')


def read_json(path: Path) -> dict[str, Any]:
    """Return what a file holds; nothing if it does not exist.

    Raises:
        DataError: If it holds anything but notes.
    """
    if not path.exists():
        return {}
    remedy = 'Remove the folder that it is in, to run that again.'
    content = data.read_json(path, remedy=remedy)
    if not isinstance(content, dict):
        got = f'a {type(content).__name__}'
        raise data.data_error(path, 'the notes of a study', got, remedy)
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file as a whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + '\n')
