"""Trainings that are killed anywhere, resumed, and compared bit for bit.

Nothing in a training knows that it will be killed. The instants are drawn by
``--seed``: half of them uniformly over the CPU time that the whole run takes,
start-up and validation included, half of them at a change of the work dir,
which is where checkpoints are written, renamed and removed.
"""

import copy
import os
import random
import signal
import time

import pytest

from mmkd.engine import runner
from tests.engine.test_resume import (
    config,
    outcome,
    plain,
)
from tests.helpers import toy
from tests.helpers.hold import cpu_seconds
from tests.peers import test_training as together

KILLS = 50
"""In all kinds of training together."""
YOLOX = 'yolox/yolox_tiny_8xb8-300e_coco.py'
NARROW = dict(
    backbone=dict(widen_factor=0.125),
    neck=dict(in_channels=[32, 64, 128], out_channels=32, num_csp_blocks=1),
    bbox_head=dict(in_channels=32, feat_channels=32),
)


# ------------------------------------------------------------ what is killed


def alone(run):
    """Plain training, which keeps one checkpoint and the best one."""
    cfg = plain(run, toy.FASTER_RCNN, val=True)
    cfg.model.test_cfg.rcnn.score_thr = 0.0  # detections, hence metrics
    cfg.default_hooks.checkpoint.update(
        max_keep_ckpts=1, save_best='coco/bbox_mAP'
    )
    return cfg


def by_epochs(run):
    return config(run, workers=2)


def by_iterations(run):
    return config(run, workers=1, iters=8)


def averaged(run):
    """Gradients of four batches and of the adapters, six batches an epoch."""
    cfg = toy.distilled(run, toy.RETINANET, epochs=3, images=6, batch=1)
    cfg.optim_wrapper.accumulative_counts = 4
    cfg.custom_hooks = [dict(type='EMAHook', momentum=0.1)]
    return unvalidated(cfg)


def with_peers(run):
    return beside(run, 'dml')


def fused(run):
    """Two peers, and a weight that rises and falls."""
    cfg = beside(run, 'ffsd')
    cfg.custom_hooks = [
        dict(type='mmkd.WeightScheduleHook', warmup=3, decay='cosine')
    ]
    return cfg


def beside(run, method):
    cfg = together.config(run, method, iterations=3)
    cfg.train_cfg.max_epochs = 3
    cfg.custom_hooks = []
    return unvalidated(cfg)


def cached(run):
    """A teacher whose maps are kept on disk, in the run's current folder."""
    cfg = toy.distilled(run, toy.RETINANET, epochs=4, images=6)
    cfg.distillation.teacher.cache = dict(dir='cache', max_gib=0.01)
    return unvalidated(cfg)


def remembering(run):
    """The stock recipe of YOLOX: sizes that change, and a mode switch."""
    cfg = plain(run, YOLOX, images=6)
    cfg.merge_from_dict(dict(model=NARROW))
    cfg.model.data_preprocessor.batch_augments[0].update(
        random_size_range=(64, 160), interval=2, size_divisor=32
    )
    cfg.custom_hooks = [
        dict(type='YOLOXModeSwitchHook', num_last_epochs=1, priority=48),
        dict(type='EMAHook', momentum=0.1, priority=49),
    ]
    cfg.optim_wrapper.accumulative_counts = 2
    return cfg


def unvalidated(cfg):
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=2)
    return cfg


KINDS = (
    *(alone, by_epochs, by_iterations, averaged),
    *(with_peers, fused, cached, remembering),
)


# ---------------------------------------------------------- how it is killed


class Training:
    """One training in a folder, in as many processes as it takes."""

    def __init__(self, folder, config):
        self.folder, self.config, self.jobs = folder, config, 0
        self.run = folder / 'run'

    def start(self):
        self.jobs += 1
        return toy.Job(
            self.folder / f'log{self.jobs}',
            'tools/train.py',
            *(self.config, '--work-dir', self.run),
            *(['--resume'] if self.jobs > 1 else []),
            cwd=self.folder,
        )

    def finish(self):
        job = self.start()
        assert job.wait() == 0, job.text()
        assert 'bit for bit' not in job.text()

    def measure(self):
        """Train to the end: return its CPU seconds and its changes."""
        return self._watch(float('inf'), float('inf'))

    def kill_at(self, seconds, changes):
        """Kill the next process; None where it has ended before."""
        return self._watch(seconds, changes)

    def _watch(self, seconds, changes):
        job = self.start()
        spent, seen, changed = 0.0, None, 0
        while job.process.is_alive():
            spent = max(spent, cpu_seconds(job.process.pid))
            found = listing(self.run)
            changed += seen is not None and found != seen
            seen = found
            if spent >= seconds or changed >= changes:
                os.kill(job.process.pid, signal.SIGKILL)
                job.process.join()
                return None
            time.sleep(0.0005)
        assert job.wait() == 0, job.text()
        assert 'bit for bit' not in job.text()
        return spent, changed


def listing(folder):
    """What a folder holds at an instant, and how much of it is written."""
    found = []
    for path in folder.rglob('*'):
        try:
            found.append((path, path.stat().st_size))
        except OSError:  # renamed or removed just now
            found.append((path, None))
    return sorted(found, key=str)


def results(run):
    return {p.relative_to(run): p for p in run.rglob('*.pth')}


def test_the_student_is_saved_after_its_peers(tmp_path, monkeypatch):
    """Else a run that ends between the two lacks the last ones for ever."""

    def die(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(runner, 'save_peers', die)
    cfg = with_peers(tmp_path)
    with pytest.raises(ZeroDivisionError):
        toy.train(cfg)
    assert not results(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.__name__)
def test_killed_anywhere(kind, tmp_path, request):
    seed = request.config.getoption('seed')
    draw = random.Random(f'{seed} {kind.__name__}')
    path = toy.write(described(kind), tmp_path / 'config.py')
    whole = Training(tmp_path / 'whole', path)
    seconds, changes = whole.measure()
    left = share_of(kind)
    told = []
    while left:
        killed = Training(tmp_path / f'killed{left}', path)
        while left:
            at = draw.uniform(0, seconds), float('inf')
            if draw.random() < 0.5:
                at = float('inf'), draw.randint(1, changes)
            if killed.kill_at(*at) is not None:
                break  # it ended before
            left -= 1
            told.append(at)
        else:
            killed.finish()
        print(f'killed at {told} of {seconds} s and {changes} changes')
        compare(whole.run, killed.run)
    print(f'{kind.__name__}: {len(told)} kills')


def compare(whole, killed):
    """Compare all checkpoints: what they hold, and that none is missing."""
    expected, found = results(whole), results(killed)
    assert found.keys() == expected.keys()
    for name, path in expected.items():
        if len(name.parts) == 1:
            one, other = outcome(path), outcome(found[name])
            assert one.pop('learning_rate') == other.pop('learning_rate')
            for each in (one, other):
                forget_counts(each['distillation'].get('memories', ()))
            assert not toy.differing(one, other, str(name))
        else:  # a peer's, which is its weights
            states = [toy.load(p)['state_dict'] for p in (path, found[name])]
            assert not toy.differing(*states, str(name))


def forget_counts(memories):
    """Leave out what MMEngine sets anew in a run that is resumed.

    It is there only if iterations came after that.
    """
    for memory in memories:
        memory['attributes'] = [
            each
            for each in memory.get('attributes', ())
            if each[:3] != ['optim_wrapper', 'attribute', '_inner_count']
        ]


def share_of(kind):
    """How many of the kills are this kind's."""
    return len(range(KINDS.index(kind), KILLS, len(KINDS)))


def described(kind):
    cfg = copy.deepcopy(kind('run'))
    cfg.custom_imports = dict(imports=['tests.helpers.toy'])
    return cfg
