"""A signal ends a training after its iteration, with everything saved."""

import ast
import copy
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmkd.engine.preemption import (
    FILENAME,
    Preempted,
    _iterations,
    _without_resume,
)
from tests.engine.test_distributed import launch
from tests.engine.test_resume import Warnings, assert_same_outcome, plain
from tests.helpers import toy


def config(work_dir, *, workers=2, iters=None, **options):
    """Two epochs of three batches, averaged, each with a validation."""
    options = {'epochs': 2, 'val': True, **options}
    cfg = plain(work_dir, images=6, **options)
    cfg.custom_imports = dict(imports=['tests.helpers.toy'])
    cfg.custom_hooks = [
        dict(type='EMAHook', momentum=0.1),
        dict(type='ToySignal'),
    ]
    cfg.model.test_cfg.score_thr = 0.0
    cfg.default_hooks.checkpoint.max_keep_ckpts = 1
    cfg.train_dataloader.update(
        num_workers=workers, persistent_workers=workers > 0
    )
    if cfg.val_dataloader is not None:
        cfg.val_dataloader.update(num_workers=1, persistent_workers=False)
        cfg.val_evaluator = dict(type='ToyFalling')  # quicker than COCO's
    if iters is not None:
        cfg.train_cfg = dict(
            type='IterBasedTrainLoop', max_iters=iters, val_interval=3
        )
        cfg.train_dataloader.sampler.type = 'InfiniteSampler'
        cfg.train_dataloader.pop('batch_sampler')
        cfg.default_hooks.checkpoint.update(by_epoch=False, interval=3)
        cfg.log_processor = dict(by_epoch=False)
    return cfg


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """The last checkpoint of a training that nobody has interrupted."""
    found = {}

    def run(**options):
        key = str(options)
        if key not in found:
            cfg = config(tmp_path_factory.mktemp('whole'), **options)
            toy.train(cfg)
            (found[key],) = Path(cfg.work_dir).glob('*.pth')
        return found[key]

    return run


def interrupted(folder, cfg, said, *arguments):
    """Train until the signal comes; return the job, and how to go on."""
    path = toy.write(cfg, folder / 'my config.py')
    job = toy.tool(
        *(folder / 'log', 'tools/train.py', path, *arguments),
        env=dict(TOY_SIGNAL=said),
    )
    number = getattr(signal, f'SIG{said.split()[0]}')
    assert job.process.exitcode == 128 + number, job.text()
    (line,) = re.findall(r'The training has got SIG.*', job.text())
    assert_no_process_left(cfg)
    return job, re.search(r'To go on: (.*)', line)[1]


def assert_no_process_left(cfg):
    for pid in ast.literal_eval(Path(cfg.work_dir, 'workers').read_text()):
        stat = Path(f'/proc/{pid}/stat')
        assert not stat.exists() or stat.read_text().split()[2] == 'Z'


def go_on(folder, command):
    words = shlex.split(command)
    script = next(n for n, word in enumerate(words) if 'train.py' in word)
    job = toy.tool(folder / 'log2', 'tools/train.py', *words[script + 1 :])
    assert job.process.exitcode == 0, job.text()
    assert 'bit for bit' not in job.text()
    return job


MOMENTS = {
    'TERM iteration 1': 1,
    'USR1 iteration 3': 3,
    'INT iteration 5': 5,
    'HUP epoch 1': None,
    'USR2 save 1': None,
    'TERM validation 1': None,
    'INT validation 2': None,
}
"""After which iteration a checkpoint is saved that would not be there."""


@pytest.mark.parametrize(
    'said',
    [
        pytest.param(
            said,
            marks=[pytest.mark.slow]
            * (said not in ('INT iteration 5', 'TERM validation 1')),
        )
        for said in MOMENTS
    ],
)
def test_ended_and_continued(tmp_path, uninterrupted, said):
    expected = uninterrupted()
    cfg = config(tmp_path / 'my run')
    job, command = interrupted(tmp_path, cfg, said)
    after = MOMENTS[said]
    if after is not None:
        saved = toy.load(tmp_path / 'my run' / FILENAME)
        assert saved['meta']['iter'] == after
        assert 'ema_state_dict' in saved
        last = (tmp_path / 'my run' / 'last_checkpoint').read_text()
        assert Path(last).name == FILENAME
        assert f'{after} iterations. All of it is in {last}.' in job.text()
    else:
        assert not (tmp_path / 'my run' / FILENAME).exists()
    go_on(tmp_path, command)
    left = [path.name for path in (tmp_path / 'my run').glob('*.pth')]
    assert left == ['epoch_2.pth']
    assert_same_outcome(expected, tmp_path / 'my run' / 'epoch_2.pth')


@pytest.mark.slow
@pytest.mark.parametrize('said', ['TERM iteration 2', 'TERM validation 1'])
def test_saved_before_a_validation_without_a_checkpoint(
    tmp_path, uninterrupted, said
):
    """The averaged weights, which it validates, are put back before."""
    expected = uninterrupted(workers=0)
    cfg = config(tmp_path / 'run', workers=0)
    cfg.default_hooks.checkpoint.interval = 2
    _, command = interrupted(tmp_path, cfg, said)
    assert (tmp_path / 'run' / FILENAME).exists()
    job = go_on(tmp_path, command)
    again = 'validation that follows the checkpoint is run again'
    assert (again in job.text()) == ('validation' in said)
    assert_same_outcome(expected, tmp_path / 'run' / 'epoch_2.pth')


@pytest.mark.slow
@pytest.mark.parametrize(
    'said', ['TERM iteration 2', 'USR1 validation 0', 'TERM iteration 5']
)
def test_iterations(tmp_path, uninterrupted, said):
    expected = uninterrupted(iters=6)
    cfg = config(tmp_path / 'run', iters=6)
    _, command = interrupted(tmp_path, cfg, said)
    go_on(tmp_path, command)
    assert_same_outcome(expected, tmp_path / 'run' / 'iter_6.pth')


def test_peers_are_saved_too(tmp_path):
    cfg = config(tmp_path / 'run', workers=0, val=False)
    cfg.distillation = dict(
        peers=dict(other=dict(config=toy.teacher_config(cfg))),
        methods=dict(dml=dict(type='mmkd.DML')),
    )
    _, command = interrupted(tmp_path, cfg, 'TERM iteration 2')
    saved = toy.load(tmp_path / 'run' / 'other' / FILENAME)
    assert saved['meta']['iter'] == 2
    go_on(tmp_path, command)
    assert not list((tmp_path / 'run').rglob(FILENAME))
    assert (tmp_path / 'run' / 'other' / 'epoch_2.pth').exists()


@pytest.mark.parametrize('moment', ['start', 'train'])
def test_before_the_first_iteration(tmp_path, moment):
    cfg = config(tmp_path / 'run')
    path = toy.write(cfg, tmp_path / 'config.py')
    job = toy.tool(
        *(tmp_path / 'log', 'tools/train.py', path),
        env=dict(TOY_SIGNAL=f'TERM {moment}'),
    )
    assert job.process.exitcode == 143, job.text()
    assert 'Traceback' not in job.text()
    assert not list((tmp_path / 'run').glob('*.pth'))
    if moment == 'train':
        assert 'nothing to save' in job.text()
        assert '--resume' not in job.text()


class Twice(Hook):
    """Sends a second signal, as people do who cannot wait."""

    def before_train_iter(self, runner, *_, **__):
        runner._preemption._when = -9.0  # it is long ago
        os.kill(os.getpid(), signal.SIGTERM)
        runner._preemption._when = -9.0
        os.kill(os.getpid(), signal.SIGTERM)
        (Path(runner.work_dir) / 'alive').touch()


def test_a_second_signal_ends_at_once(tmp_path):
    cfg = config(tmp_path / 'run', epochs=1, val=False)
    cfg.custom_imports = dict(imports=['tests.engine.test_preemption'])
    cfg.custom_hooks = [dict(type='ToyTwice')]
    path = toy.write(cfg, tmp_path / 'config.py')
    job = toy.tool(tmp_path / 'log', 'tools/train.py', path)
    assert job.process.exitcode == -signal.SIGTERM, job.text()
    assert not (tmp_path / 'run' / 'alive').exists()


HOOKS.register_module(name='ToyTwice', module=Twice, force=True)


class Interrupt(Hook):
    def __init__(self, number, iteration=1, times=1):
        self.number, self.iteration, self.times = number, iteration, times

    def before_train_iter(self, runner, *_, **__):
        if runner.iter + 1 == self.iteration:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


class TestInThisProcess:
    def train(self, tmp_path, hook, **changes):
        cfg = plain(tmp_path, epochs=1)
        cfg.merge_from_dict(changes)
        runner = toy.build(cfg)
        runner.register_hook(hook)
        self.warnings = Warnings(runner)
        runner.train()
        return runner

    def test_handlers_are_put_back(self, tmp_path):
        before = [signal.getsignal(n) for n in range(1, 20)]
        with pytest.raises(Preempted) as caught:
            self.train(tmp_path, Interrupt(signal.SIGTERM))
        assert caught.value.code == 143
        with pytest.raises(KeyboardInterrupt):
            self.train(tmp_path, Interrupt(signal.SIGINT))
        assert [signal.getsignal(n) for n in range(1, 20)] == before

    def test_what_a_launcher_passes_on_is_the_same_signal(self, tmp_path):
        with pytest.raises(Preempted):
            self.train(tmp_path, Interrupt(signal.SIGTERM, times=2))
        assert toy.load(tmp_path / FILENAME)['meta']['iter'] == 1

    def test_pools_of_processes(self, tmp_path):
        """As of MMDetection's evaluation for VOC, which ends them itself."""
        ended, alive = [], []

        class Pools(Hook):
            def after_train_iter(self, *_, **__):
                for _ in range(2):
                    with multiprocessing.get_context('fork').Pool(3) as pool:
                        pool.map(abs, range(3))
                        # Another process sends it, to all of a group.
                        kill = [str(p.pid) for p in pool._pool]
                        subprocess.run(['kill', *kill], check=True)
                        time.sleep(0.01)
                        alive.extend(p.is_alive() for p in pool._pool)
                        processes = list(pool._pool)
                    for process in processes:
                        process.join(20)
                        ended.append(process.exitcode is not None)

        send = threading.Timer(60, os.kill, (os.getpid(), signal.SIGKILL))
        send.start()  # nothing else ends a hanging pool
        toy.train(config(tmp_path, workers=0, val=False), Pools())
        send.cancel()
        assert len(ended) == 6 * 2 * 3
        assert all(ended)
        assert all(alive)

    def test_the_handlers_of_others_stay(self, tmp_path):
        got = []
        old = signal.signal(signal.SIGUSR2, lambda *_: got.append(1))
        try:
            runner = self.train(tmp_path, Interrupt(signal.SIGUSR2))
        finally:
            signal.signal(signal.SIGUSR2, old)
        assert got
        assert runner.iter == 3
        log = next(tmp_path.glob('*/*.log')).read_text()
        assert 'SIGUSR2 has a handler already, which stays' in log

    def test_in_the_last_iteration(self, tmp_path):
        with pytest.raises(Preempted):
            self.train(tmp_path, Interrupt(signal.SIGTERM, iteration=3))
        assert toy.load(tmp_path / FILENAME)['meta']['iter'] == 3
        runner = self.train(
            tmp_path, Interrupt(signal.SIGTERM, 9), resume=True
        )
        assert runner.epoch == 1
        assert not (tmp_path / FILENAME).exists()

    def test_after_the_last_checkpoint(self, tmp_path):
        class Late(Hook):
            def after_run(self, runner):
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Preempted):
            self.train(tmp_path, Late())
        (text,) = self.warnings.about('SIGTERM')
        assert text.endswith('The training is complete.')

    def test_without_a_checkpoint_hook(self, tmp_path):
        with pytest.raises(Preempted):
            self.train(
                tmp_path,
                Interrupt(signal.SIGTERM),
                **{'default_hooks.checkpoint': None},
            )
        assert (tmp_path / FILENAME).exists()

    def test_a_hook_that_has_to_act_after_a_validation(self, tmp_path):
        """Its validation is not broken off."""

        class Guarded(Interrupt):
            before = after = 0

            def before_val(self, runner):
                self.before += 1

            def after_val_iter(self, *_, **__):
                os.kill(os.getpid(), signal.SIGTERM)

            def after_val(self, runner):
                self.after += 1

        hook = Guarded(signal.SIGTERM, 9)
        cfg = plain(tmp_path, epochs=2, val=True, images=2)
        cfg.val_evaluator = dict(type='ToyFalling')
        runner = toy.build(cfg)
        runner.register_hook(hook)
        with pytest.raises(Preempted):
            runner.train()
        assert hook.before == hook.after == 1
        assert runner.iter == 1

    def test_plain_mmengine(self, tmp_path):
        """`mmkd train` saves for MMEngine's runner as well."""
        cfg = config(tmp_path / 'run', workers=0)
        cfg.pop('runner_type')
        _, command = interrupted(tmp_path, cfg, 'TERM iteration 2')
        saved = toy.load(tmp_path / 'run' / FILENAME)
        assert saved['meta']['iter'] == 2
        assert '--resume' in command


def test_a_stock_checkpoint(tmp_path):
    """MMDetection's own runner loads it, and trains on."""
    cfg = plain(tmp_path, epochs=1)
    stock = copy.deepcopy(cfg)
    runner = toy.build(cfg)
    runner.register_hook(Interrupt(signal.SIGTERM, 2))
    with pytest.raises(Preempted):
        runner.train()
    stock.pop('runner_type')
    stock.resume, stock.load_from = True, str(tmp_path / FILENAME)
    runner = toy.build(stock)
    runner.train()
    weights = toy.load(tmp_path / FILENAME)['state_dict']
    assert weights.keys() == runner.model.state_dict().keys()
    assert isinstance(next(iter(weights.values())), torch.Tensor)


@pytest.mark.parametrize(
    ('seconds', 'iterations'),
    [(0, 1), (2, 1), (0.3, 1), (0.1, 5), (1e-9, 100)],
)
def test_how_often_processes_exchange(seconds, iterations):
    assert _iterations(seconds) == iterations


@pytest.mark.parametrize(
    ('before', 'after'),
    [
        ('a.py --resume', 'a.py'),
        ('--resume b.pth a.py', 'a.py'),
        ('a.py --res=b.pth --amp', 'a.py --amp'),
        ('a.py --resume --amp --work-dir x', 'a.py --amp --work-dir x'),
    ],
)
def test_the_command_resumes_once(before, after):
    assert _without_resume(before.split()) == after.split()


def distributed(work_dir, **options):
    cfg = config(work_dir, workers=1, **options)
    cfg.env_cfg.dist_cfg = dict(backend='gloo', timeout=60)
    cfg.train_dataloader.batch_size = 1
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize(
    'said', ['TERM iteration 2', 'TERM train', 'USR1 validation 1']
)
def test_one_of_two_processes_gets_it(tmp_path, said):
    """Both end after the same iteration."""
    whole = distributed(tmp_path / 'whole')
    launch(tmp_path, whole)
    cfg = distributed(tmp_path / 'run')
    number = getattr(signal, f'SIG{said.split()[0]}')
    jobs = launch(
        *(tmp_path / 'ended', cfg),
        status=128 + number,
        TOY_SIGNAL=said,
        TOY_SIGNAL_RANK='1',
    )
    texts = [job.text() for job in jobs]
    assert texts[0].count('The training has got SIG') == 1
    assert 'start the job with the same command' in texts[0]
    if said == 'TERM iteration 2':  # what they exchange is read later
        assert toy.load(tmp_path / 'run' / FILENAME)['meta']['iter'] > 2
    jobs = launch(tmp_path / 'on', cfg, '--resume')
    assert 'bit for bit' not in jobs[0].text()
    assert_same_outcome(
        tmp_path / 'whole' / 'epoch_2.pth', tmp_path / 'run' / 'epoch_2.pth'
    )
