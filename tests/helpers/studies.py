"""Studies of tiny detectors: their files, their runs, their processes."""

import contextlib
import fcntl
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from mmkd.cli import main
from mmkd.study import inputs
from mmkd.study.run import Run
from mmkd.study.study import Study, read_study
from tests.helpers import toy

HELD = {'default_hooks.timer.type': 'tests.helpers.hold.Timer'}
"""The options of a run that waits for ``hold`` after its first epoch."""


def write_configs(folder: Path) -> Path:
    """Write two tiny configs, plain.py and distilled.py."""
    for name, make in (('plain', toy.plain), ('distilled', toy.distilled)):
        config = make(folder, epochs=2, images=4)
        # A detector of two epochs is sure of nothing.
        config.model.test_cfg.rcnn.score_thr = 0.0
        config.train_cfg.val_interval = 2
        toy.write(config, folder / f'{name}.py')
    return folder


class StudyFile:
    """A study's file, whose ``content`` is written whenever it is read."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content
        self.networks: dict[str, Any] = content['runs']

    def write(self) -> Path:
        self.path.write_text(yaml.dump(self.content, sort_keys=False))
        return self.path

    def read(self) -> Study:
        return read_study(self.write())

    def runs(self) -> dict[str, Run]:
        """The runs by network; where there are more seeds, the last."""
        return {run.network: run for run in self.read().runs}

    def finish(self) -> dict[str, Run]:
        runs = self.runs()
        for run in runs.values():
            finish(run)
        return runs

    def plan(self, *options: str) -> dict[str, str]:
        """What ``mmkd study --dry-run`` says of the networks, with seed 0."""
        inputs.hash_path.cache_clear()
        words = ['study', str(self.write()), '--dry-run', *options]
        with contextlib.redirect_stdout(io.StringIO()) as told:
            assert main(words) == 0
        lines = told.getvalue().splitlines()
        pairs = [line.split(None, 1) for line in lines if '-seed0 ' in line]
        return {name.removesuffix('-seed0'): text for name, text in pairs}


def a_checkpoint(folder: Path, weight: float = 1.0) -> Path:
    path = folder / 'some.pth'
    torch.save({'state_dict': {'w': torch.tensor(weight)}}, path)
    return path


def finish(run: Run, weight: float = 1.0, ap: float = 0.0) -> None:
    """Leave the files of a run that is done."""
    run.folder.mkdir(parents=True)
    step = run.next_step
    if step.name == 'train':
        file = a_checkpoint(run.work_dir, weight)
        shutil.copy(file, run.folder / 'epoch_2.pth')
    step.note(fingerprint=run.inputs, finished='then')
    result = {
        'metrics': {'coco/bbox_mAP': ap},
        'training_seconds': 90.0,
        'training_cpu_seconds': 60.0,
        'memory_mib': 800.0,
        'inputs': run.inputs,
        'checkpoint': run.checkpoint_hash,
    }
    (run.folder / 'result.json').write_text(json.dumps(result))


def cells(text: str, name: str, number: int = 0) -> list[str]:
    """The cells behind a row's name, of the table with this number."""
    rows = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in text.splitlines()
    ]
    return [row[1:] for row in rows if row[0] == name][number]


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """A server of a folder's files; yields its address."""
    handler = partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        loop = threading.Thread(
            target=server.serve_forever, kwargs={'poll_interval': 0.01}
        )
        loop.start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()
        loop.join()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


# ---------------------------------------------------------------- processes


def start(path: Path, code: Path, *options: str) -> subprocess.Popen[str]:
    """Start a study in a process that imports mmkd from the folder code."""
    return subprocess.Popen(
        [sys.executable, '-m', 'mmkd', 'study', str(path), *options],
        cwd=path.parent,
        env={**os.environ, 'PYTHONPATH': f'{code}{os.pathsep}{toy.ROOT}'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_all(path: Path, code: Path, *options: str) -> tuple[int, str]:
    """Run a study to its end; return its exit status and its output."""
    process = start(path, code, *options)
    output, _ = process.communicate()
    return process.returncode, output


def wait_for(process: subprocess.Popen[str], path: Path) -> None:
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


def kill(process: subprocess.Popen[str], folder: Path, hold: Path) -> None:
    """Kill a study, and wait for the end of the training that it held.

    The system sends the training a signal, upon which it saves a checkpoint.
    """
    process.kill()
    process.wait()
    hold.unlink()
    with (folder / '.lock').open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
