"""A work dir belongs to one training."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmkd.data.files import remove_leftovers, replacement
from mmkd.data.lock import locked
from mmkd.engine.work_dir import LOCK, one_training
from mmkd.errors import CheckpointError, WorkDirError
from tests.helpers import toy
from tests.helpers.hold import VARIABLE, reached


def config(folder, **changes):
    cfg = toy.plain(folder / 'run', toy.RETINANET, images=2, epochs=2)
    cfg.runner_type = toy.RUNNER
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.default_hooks.timer.type = 'tests.helpers.hold.Timer'
    cfg.train_dataloader.update(num_workers=1, persistent_workers=True)
    cfg.update(changes)
    return cfg


def files(folder):
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob('*')
    }


def held_training(folder, path, *arguments):
    """Start a training that waits after its first epoch."""
    flag = folder / 'hold'
    flag.touch()
    job = toy.Job(
        *(folder / 'first', 'tools/train.py', path, *arguments),
        env={VARIABLE: str(flag)},
    )
    while not reached(flag).exists():
        assert job.process.is_alive(), job.text()
        time.sleep(0.05)
    return job


@pytest.mark.parametrize('runner', [toy.RUNNER, 'Runner'])
def test_a_second_training_and_one_that_is_killed(tmp_path, runner):
    """The second one writes nothing; after SIGKILL the work goes on."""
    path = toy.write(config(tmp_path, runner_type=runner), tmp_path / 'c.py')
    run = tmp_path / 'run'
    first = held_training(tmp_path, path, '--work-dir', run)
    before = files(run)
    arguments = ('tools/train.py', path, '--work-dir', run)
    second = toy.tool(tmp_path / 'second', *arguments)
    assert second.process.exitcode == 1
    assert files(run) == before
    last = second.text().strip().splitlines()[-1]
    assert last.startswith(
        f'error: another training is at work in {run}: process '
        f'{first.process.pid} on {os.uname().nodename}, since 20'
    )
    os.kill(first.process.pid, signal.SIGKILL)
    first.wait()
    assert (run / LOCK).exists()
    third = toy.tool(tmp_path / 'third', *arguments, '--resume')
    assert third.process.exitcode == 0, third.text()[-3000:]
    assert (run / 'epoch_2.pth').exists()
    assert not (run / LOCK).exists()


def test_a_test_beside_a_training(tmp_path):
    """It is allowed, and leaves the config of the training as it is."""
    cfg = config(tmp_path, test_cfg=dict(type='TestLoop'))
    path = toy.write(cfg, tmp_path / 'c.py')
    run = tmp_path / 'run'
    first = held_training(tmp_path, path, '--work-dir', run)
    dumped = (run / 'c.py').stat()
    test = toy.tool(
        *(tmp_path / 'test', 'tools/test.py', path, run / 'epoch_1.pth'),
        *('--work-dir', run),
    )
    assert test.process.exitcode == 0, test.text()[-3000:]
    assert (run / 'c.py').stat() == dumped
    assert (run / LOCK).exists()
    (tmp_path / 'hold').unlink()
    assert first.wait() == 0, first.text()[-3000:]


def test_a_runner_of_one_s_own(tmp_path):
    runner = toy.build(config(tmp_path))
    with (
        locked(tmp_path / 'run' / LOCK),
        pytest.raises(WorkDirError, match=f'process {os.getpid()} on '),
    ):
        runner.train()
    assert not list((tmp_path / 'run').glob('*.pth'))
    runner.train()
    assert (tmp_path / 'run' / 'epoch_2.pth').exists()


def test_within_one_process_it_is_taken_once(tmp_path):
    with one_training(str(tmp_path)):
        with one_training(f'{tmp_path}/.'):
            assert (tmp_path / LOCK).exists()
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_a_folder_that_cannot_be_locked(tmp_path):
    (tmp_path / LOCK).mkdir()
    with (
        pytest.raises(CheckpointError, match=r'cannot be locked .*--work-dir'),
        one_training(str(tmp_path)),
    ):
        pass


LEAVE = """
import os, signal, sys
from pathlib import Path
from mmkd.data.files import replacement
with replacement(Path(sys.argv[1])) as temporary:
    temporary.write_text('half')
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_was_writing(tmp_path):
    """It is removed; what others write, or users have there, stays."""
    (tmp_path / 'peer').mkdir()
    for name in ('epoch_1.pth', 'peer/epoch_1.pth', f'{"x" * 250}.pth'):
        command = [sys.executable, '-c', LEAVE, str(tmp_path / name)]
        assert subprocess.run(command).returncode == -signal.SIGKILL
    others = ['.mine.tmp', '.x.1.tmp', 'epoch_1.pth.tmp']
    for name in others:
        (tmp_path / name).touch()
    fresh = tmp_path / '.a.pth.1-0123abcd@elsewhere.tmp'
    old = tmp_path / '.b.pth.1-0123abcd@elsewhere.tmp'
    fresh.touch()
    old.touch()
    os.utime(old, (0, 0))
    with replacement(tmp_path / 'mine') as own:
        own.write_text('whole')
        with one_training(str(tmp_path)):
            left = {p.name for p in tmp_path.rglob('*') if p.is_file()}
            assert left == {*others, fresh.name, own.name, LOCK}
    assert (tmp_path / 'mine').read_text() == 'whole'


def test_names_are_not_shared(tmp_path):
    with replacement(tmp_path / 'a') as one, replacement(tmp_path / 'a') as b:
        assert one != b
        one.write_text('first')
        b.write_text('second')
    assert (tmp_path / 'a').read_text() == 'first'
    remove_leftovers(tmp_path)
    assert [Path(p).name for p in tmp_path.iterdir()] == ['a']
