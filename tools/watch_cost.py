"""Measure which share of a training's CPU time goes into watching it.

    python tools/watch_cost.py configs/bccd/methods/pkd.py [KEY=VALUE ...]
    python tools/watch_cost.py configs/bccd/methods/pkd.py balance

Watching is what a run does to be safe: looking for what is not finite, for
signals, and for the state that a resumed run needs; and the data samples of
their own that each network gets. The student trains 20 iterations by itself,
after 5 that do not count, on one thread and with an untrained teacher. The
time of checkpoints is not part of it. With ``balance``, the shares of the
gradient are measured in each of these iterations, and what that takes is told
apart from the rest.
"""

import functools
import sys
import tempfile
import time
from collections import defaultdict

import torch
from mmengine.config import Config, DictAction
from mmengine.hooks import Hook

from mmkd.data.batch import Batch
from mmkd.engine.hooks import GradientBalanceHook, LossCheckHook
from mmkd.engine.preemption import PreemptionHook
from mmkd.engine.resume import ExactResumeHook
from mmkd.engine.runner import DistillationRunner

WATCHING = (
    (LossCheckHook, '_before'),
    (LossCheckHook, 'observe'),
    (LossCheckHook, 'after_train_iter'),
    (PreemptionHook, 'after_train_iter'),
    (ExactResumeHook, 'before_train_iter'),
    (Batch, 'copies'),
)
BALANCING = (
    (GradientBalanceHook, 'before_train_iter'),
    (GradientBalanceHook, 'observe'),
    (GradientBalanceHook, 'after_train_iter'),
)
# The weights stay, as long as no share is above .998.
BALANCE = dict(share=0.5, tolerance=0.498, interval=1)
INTERVAL = 50
FIRST, LAST = 5, 25

seconds: dict[str, float] = defaultdict(float)


class Stopwatch(Hook):
    priority = 'VERY_HIGH'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == FIRST:
            seconds.clear()
            seconds['iteration'] = -time.process_time()

    def after_train(self, runner):
        seconds['iteration'] += time.process_time()


def timed(owner: type, name: str) -> None:
    function = getattr(owner, name)

    @functools.wraps(function)
    def measured(*args, **kwargs):
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            place = f'{owner.__name__}.{name}'
            seconds[place] += time.process_time() - start

    setattr(owner, name, measured)


def main(config: str, *options: str) -> None:
    torch.set_num_threads(1)
    balance = 'balance' in options
    for owner, name in (*WATCHING, *BALANCING):
        timed(owner, name)
    cfg = Config.fromfile(config)
    pairs = (o.split('=', 1) for o in options if o != 'balance')
    cfg.merge_from_dict({k: DictAction._parse_iterable(v) for k, v in pairs})
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=LAST)
    cfg.log_processor = dict(by_epoch=False)
    cfg.param_scheduler, cfg.custom_hooks = [], []
    if balance:
        cfg.custom_hooks = [dict(type='mmkd.GradientBalanceHook', **BALANCE)]
    cfg.default_hooks.checkpoint = None
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    for name in ('dataloader', 'evaluator', 'cfg'):
        cfg[f'val_{name}'] = cfg[f'test_{name}'] = None
    if cfg.get('distillation', {}).get('teacher'):
        cfg.distillation.teacher.checkpoint = None
    with tempfile.TemporaryDirectory() as cfg.work_dir:
        runner = DistillationRunner.from_cfg(cfg)
        runner.register_hook(Stopwatch())
        runner.train()
    names = [f'{owner.__name__}.{name}' for owner, name in BALANCING]
    measuring = sum(seconds.pop(name, 0.0) for name in names)
    total = seconds.pop('iteration') - measuring
    print(f'{"an iteration":32s} {1e3 * total / (LAST - FIRST):9.2f} ms')
    for place, spent in seconds.items():
        each = 1e3 * spent / (LAST - FIRST)
        print(f'{place:32s} {each:9.2f} ms {100 * spent / total:6.3f} %')
    share = sum(seconds.values()) / total
    print(f'{"together":32s} {"":12s} {100 * share:6.3f} %')
    if balance:
        each, share = 1e3 * measuring / (LAST - FIRST), measuring / total
        print(f'\n{"a measurement of the shares":32s} {each:9.2f} ms')
        every = f'in every {INTERVAL}th iteration'
        print(f'{every:32s} {"":12s} {100 * share / INTERVAL:6.3f} %')


if __name__ == '__main__':
    main(*sys.argv[1:])
