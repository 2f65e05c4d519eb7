"""Trainings: planned, run side by side, continued."""

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from mmengine.config import Config, DictAction

from mmkd.detectors.source import load_config
from mmkd.errors import MMKDError

NEEDS = {'teacher': [], 'student': [], 'distilled': ['teacher']}
"""Each network, and those that have to be trained before it."""
PACKAGES = (
    'mmkd', 'torch', 'onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection',
    'mmengine', 'mmcv', 'mmdet', 'numpy', 'pycocotools',
)  # fmt: skip
LIBC = ctypes.CDLL(None)


class DemoError(MMKDError):
    """Why the demo cannot go on, and what helps."""


@dataclass
class Network:
    """One network of the demo, and its training."""

    name: str
    folder: Path
    options: list[str]
    config: Config
    fingerprint: str

    @property
    def checkpoint(self) -> Path:
        """The last one."""
        epochs = self.config.train_cfg.max_epochs
        return self.folder / f'epoch_{epochs}.pth'

    @property
    def log(self) -> Path:
        return self.folder / 'log.txt'

    @property
    def command(self) -> list[str]:
        """The training, as arguments of Python."""
        command = ['-m', 'mmkd', 'train', f'mmkd::neon/{self.name}.py']
        command += ['--work-dir', os.path.relpath(self.folder), '--resume']
        return [*command, '--cfg-options', *self.options]

    @property
    def state(self) -> dict[str, Any]:
        """What was noted of its training; empty before the first."""
        return read_json(self.folder / 'demo.json')

    def note(self, **changes: Any) -> None:
        write_json(self.folder / 'demo.json', self.state | changes)

    @property
    def finished(self) -> bool:
        # The last checkpoint is written before the last validation.
        return 'finished' in self.state and self.checkpoint.exists()


# ---------------------------------------------------------------- planning


def plan(
    work_dir: Path, data: Path, options: Sequence[str]
) -> dict[str, Network]:
    """Read the configs; remove trainings of which something has changed."""
    annotations = [path.read_bytes() for path in sorted(data.rglob('*.json'))]
    software = json.dumps(versions(), sort_keys=True).encode()
    networks: dict[str, Network] = {}
    for name, needed in NEEDS.items():
        config = load_config(f'mmkd::neon/{name}.py')
        config.merge_from_dict(parse_options(options))
        before = [networks[n].fingerprint.encode() for n in needed]
        mark = fingerprint(config, *annotations, software, *before)
        network = Network(name, work_dir / name, [*options], config, mark)
        for n in needed:
            path = os.path.relpath(networks[n].checkpoint)
            network.options.append(f'distillation.{n}.checkpoint={path}')
        networks[name] = network
        remove_outdated(network)
    return networks


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Parse as ``mmkd train`` does."""
    parser = argparse.ArgumentParser()
    parser.add_argument('options', nargs='*', action=DictAction)
    return parser.parse_args(options).options or {}


def fingerprint(config: Config, *others: bytes) -> str:
    """Changes when the config or anything else given changes."""
    text = json.dumps(config.to_dict(), sort_keys=True, default=repr)
    digest = hashlib.sha256(text.encode())
    for other in others:
        digest.update(hashlib.sha256(other).digest())
    return digest.hexdigest()


def remove_outdated(network: Network) -> None:
    """Remove a training with another fingerprint.

    Raises:
        DemoError: If the folder is not the demo's.
    """
    folder = network.folder
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not network.state:
        raise DemoError(
            f'{folder} holds files that are not of this demo. Move them away, '
            'or choose another folder with --work-dir.'
        )
    if network.state['fingerprint'] != network.fingerprint:
        print(f'{network.name}: config, data or versions changed, begun anew')
        shutil.rmtree(folder)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keep a folder to one process and to the trainings that inherit the lock.

    Raises:
        DemoError: If another holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / '.lock').open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoError(
                f'another process, or a training that it left behind, is at '
                f'work in {folder}. End it, or choose another work dir.'
            ) from None
        yield file.fileno()


# ----------------------------------------------------------------- running


class Work(Protocol):
    """What a :class:`Training` runs, and where that is noted."""

    folder: Path
    fingerprint: Any

    @property
    def log(self) -> Path: ...

    @property
    def command(self) -> list[str]: ...

    @property
    def state(self) -> dict[str, Any]: ...

    def note(self, **changes: Any) -> None: ...


@dataclass
class Training:
    """A running ``mmkd train``, or another command."""

    network: Work
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)
    peak: float = 0.0
    """Resident memory in MiB."""

    @classmethod
    def start(cls, network: Work, lock: int) -> 'Training':
        network.folder.mkdir(parents=True, exist_ok=True)
        network.note(fingerprint=network.fingerprint)
        with network.log.open('ab') as log:
            process = subprocess.Popen(
                [sys.executable, *network.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock],
                # Ctrl-C reaches this process alone, which stops them.
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        return cls(network, process)

    def ended(self) -> bool:
        """Whether it has; then its time is noted, and whether it is done."""
        if self.process.returncode is not None:
            return True
        self.peak = max(self.peak, peak_resident(self.process.pid))
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not pid:
            return False
        self.process.returncode = os.waitstatus_to_exitcode(status)
        old = self.network.state
        wall = time.monotonic() - self.started
        cpu = usage.ru_utime + usage.ru_stime
        self.network.note(
            wall_seconds=round(old.get('wall_seconds', 0) + wall, 1),
            cpu_seconds=round(old.get('cpu_seconds', 0) + cpu, 1),
            peak_mib=round(max(old.get('peak_mib', 0), self.peak), 1),
        )
        if self.process.returncode == 0:
            self.network.note(finished=now())
        return True


def _end_with_parent() -> None:
    """Let a killed parent take this process along (Linux)."""
    with contextlib.suppress(AttributeError):
        LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def peak_resident(pid: int | str = 'self') -> float:
    """Peak resident memory of a process in MiB; 0 if it has ended (Linux).

    Not ``ru_maxrss``: a child starts with its parent's.
    """
    with contextlib.suppress(OSError):
        for line in Path(f'/proc/{pid}/status').read_text().splitlines():
            if line.startswith('VmHWM:'):
                return int(line.split()[1]) / 2**10
    return 0.0


def train(networks: Mapping[str, Network], jobs: int, lock: int) -> None:
    """Train what is not finished, as many at a time as there are jobs.

    Raises:
        DemoError: If a training fails. The others are stopped.
    """
    for network in networks.values():
        if network.finished:
            print(f'{network.name}: trained already, reused')
    waiting = [n for n in networks.values() if not n.finished]
    running: list[Training] = []
    progress = Progress([n.name for n in waiting])
    try:
        while waiting or running:
            for network in list(waiting):
                ready = all(networks[n].finished for n in NEEDS[network.name])
                if ready and len(running) < jobs:
                    waiting.remove(network)
                    running.append(Training.start(network, lock))
            time.sleep(0.5)
            for training in list(running):
                if training.ended():
                    running.remove(training)
                progress.tell(training.network.name, status(training))
                if training.process.returncode:
                    raise failure(training)
    finally:
        stop(running)


def stop(trainings: Sequence[Training]) -> None:
    """End them; their checkpoints are whole at every moment."""
    for training in trainings:
        if not training.ended():
            training.process.terminate()
    deadline = time.monotonic() + 10
    for training in trainings:
        while not training.ended():
            if time.monotonic() > deadline:
                training.process.kill()
            time.sleep(0.05)


def failure(training: Training) -> DemoError:
    log = training.network.log
    lines = log.read_text(errors='replace').splitlines()[-15:]
    tail = '\n'.join(f'  | {line[:200]}' for line in lines)
    return DemoError(
        f'training the {training.network.name} failed '
        f'(exit status {training.process.returncode}). The end of its log:\n'
        f'{tail}\nAll of it: {log}'
    )


# ---------------------------------------------------------------- progress


class Progress:
    """A line for each network: redrawn on a terminal, else one an epoch."""

    def __init__(self, names: Sequence[str]) -> None:
        self.lines = dict.fromkeys(names, 'waits')
        self.live = sys.stdout.isatty()
        self.width = max([11, *(len(name) + 2 for name in names)])
        if self.live:
            print('\n' * len(names), end='')

    def tell(self, name: str, line: str) -> None:
        old, self.lines[name] = self.lines[name], line
        if self.live and line != old:
            width = shutil.get_terminal_size().columns - 1
            print(f'\x1b[{len(self.lines)}F', end='')
            for network, text in self.lines.items():
                print(
                    '\x1b[2K' + f'{network:<{self.width}}{text}'[:width],
                    flush=True,
                )
        elif line.split('loss')[0] != old.split('loss')[0]:
            print(f'{name:<{self.width}}{line}', flush=True)


def status(training: Training) -> str:
    """What to tell of a training in one line."""
    network = training.network
    if training.process.returncode is None:
        log = network.log.read_text(errors='replace')
        return last_progress(log, network.config.train_cfg.max_epochs)
    if training.process.returncode:
        return 'failed'
    state = network.state
    wall, cpu = state['wall_seconds'] / 60, state['cpu_seconds'] / 60
    return f'trained in {wall:.1f} minutes ({cpu:.1f} of CPU time)'


def last_progress(log: str, epochs: int) -> str:
    """The newest epoch, loss, remaining time and AP of MMEngine's log."""
    trained = re.findall(
        r'Epoch\(train\) +\[(\d+)\].* eta: (.+?)  .* loss: (\S+)', log
    )
    if not trained:
        return 'starts'
    epoch, left, loss = trained[-1]
    line = f'epoch {epoch:>2} of {epochs}   loss {loss}   {left} left'
    validated = re.findall(r'Epoch\(val\).* coco/bbox_mAP: (\S+)', log)
    if validated:
        line += f'   AP {100 * float(validated[-1]):.1f}'
    return line


# ------------------------------------------------------------------- notes


def versions() -> dict[str, str]:
    found = {'python': platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec='seconds')


def read_json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing if there is none."""
    with contextlib.suppress(FileNotFoundError):
        return json.loads(path.read_text())
    return {}


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_name(f'{path.name}.tmp')
    partial.write_text(json.dumps(data, indent=1) + '\n')
    partial.replace(path)
