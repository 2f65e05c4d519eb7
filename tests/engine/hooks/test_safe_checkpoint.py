"""Save, point to it, remove: in this order, and each step whole."""

import copy
import functools
import os
import sys
from pathlib import Path

import pytest
from mmengine.hooks import CheckpointHook, Hook

from mmkd.engine.hooks import SafeCheckpointHook
from mmkd.errors import ConfigError
from tests.helpers import toy

TRACE = []
TRACING = []


@functools.cache
def start_tracing():
    """Let Python report each renaming and removal of a checkpoint."""

    def audit(event, arguments):
        if TRACING and event in ('os.rename', 'os.remove'):
            names = [
                Path(a).name
                for a in arguments[:2]
                if isinstance(a, str | os.PathLike)
            ]
            if names[-1:] and ('.pth' in names[-1] or 'last_' in names[-1]):
                TRACE.append((event.removeprefix('os.'), names[-1]))

    sys.addaudithook(audit)


@pytest.fixture
def trace():
    start_tracing()
    TRACE.clear()
    TRACING.append(True)
    yield TRACE
    TRACING.clear()


def config(tmp_path, *, epochs=3, keep=1, **options):
    cfg = toy.distilled(tmp_path, images=2, epochs=epochs)
    cfg.default_hooks.checkpoint = dict(
        type='CheckpointHook', interval=1, max_keep_ckpts=keep, **options
    )
    if 'save_best' not in options:
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    return cfg


def renamed(name):
    return ('rename', name)


def pointed():
    return renamed('last_checkpoint')


class Own(CheckpointHook):
    """A hook of one's own, which is left in its place."""


@pytest.mark.parametrize(
    'kind',
    [
        'CheckpointHook',
        'mmengine.CheckpointHook',
        'mmengine.hooks.CheckpointHook',
        'mmengine.hooks.checkpoint_hook.CheckpointHook',
        CheckpointHook,
        SafeCheckpointHook,
        'mmkd.engine.hooks.SafeCheckpointHook',
        Own,
    ],
)
def test_the_runner_puts_it_in_the_stock_hook_s_place(tmp_path, kind):
    cfg = config(tmp_path)
    cfg.default_hooks.checkpoint.update(type=kind, priority='LOW')
    cfg.default_hooks.checkpoint.pop('interval')
    cfg.custom_hooks = [dict(type=kind, interval=7, by_epoch=False)]
    first, second = (
        h for h in toy.build(cfg).hooks if isinstance(h, CheckpointHook)
    )
    expected = kind if kind is Own else SafeCheckpointHook
    assert type(first) is type(second) is expected
    assert (first.max_keep_ckpts, first.priority) == (1, 'LOW')
    stock = 'Safe' not in str(kind) and kind is not Own
    assert first.interval == (1 if stock else -1)
    assert (second.interval, second.by_epoch) == (7, False)


def test_options_are_checked_however_the_hook_is_named(tmp_path):
    for kind in (CheckpointHook, SafeCheckpointHook, 'CheckpointHook'):
        cfg = config(tmp_path)
        cfg.default_hooks.checkpoint = dict(type=kind, intervall=1)
        with pytest.raises(ConfigError, match=r'Did you mean "interval"'):
            toy.build(cfg)


def test_order(tmp_path, trace):
    toy.train(config(tmp_path))
    assert trace == [
        renamed('epoch_1.pth'),
        pointed(),
        renamed('epoch_2.pth'),
        pointed(),
        ('remove', 'epoch_1.pth'),
        renamed('epoch_3.pth'),
        pointed(),
        ('remove', 'epoch_2.pth'),
    ]
    assert (tmp_path / 'last_checkpoint').read_text() == str(
        tmp_path / 'epoch_3.pth'
    )


@pytest.mark.parametrize(('keep', 'left'), [(2, [3, 4]), (-1, [1, 2, 3, 4])])
def test_how_many_are_kept(tmp_path, keep, left):
    toy.train(config(tmp_path, epochs=4, keep=keep))
    names = sorted(p.name for p in tmp_path.glob('*.pth'))
    assert names == [f'epoch_{n}.pth' for n in left]
    hub = toy.load(tmp_path / 'epoch_4.pth')['message_hub']
    if keep == 2:  # with the one that is removed when it is saved
        assert hub['runtime_info']['keep_ckpt_ids'] == [2, 3, 4]


def test_a_resumed_run_removes_what_the_killed_one_left(tmp_path):
    cfg = config(tmp_path, epochs=2)
    runner = toy.build(cfg)
    original = runner.save_checkpoint

    class Killed(BaseException):
        pass

    def killed_behind_the_second(*args, **kwargs):
        original(*args, **kwargs)
        if runner.epoch == 1:
            raise Killed

    runner.save_checkpoint = killed_behind_the_second
    with pytest.raises(Killed):
        runner.train()
    assert sorted(p.name for p in tmp_path.glob('*.pth')) == [
        'epoch_1.pth',
        'epoch_2.pth',
    ]
    cfg = config(tmp_path, epochs=3)
    cfg.resume, cfg.load_from = True, str(tmp_path / 'epoch_2.pth')
    toy.train(cfg)
    assert [p.name for p in tmp_path.glob('*.pth')] == ['epoch_3.pth']


class Nothing(Hook):
    """As of networks that detect nothing: their metrics are missing."""

    priority = 'NORMAL'

    def __init__(self, *lacking):
        self.lacking = lacking

    def after_val_epoch(self, runner, metrics=None):
        for name in list(metrics):
            if name.startswith(self.lacking) and runner.epoch == 1:
                del metrics[name]


@pytest.mark.parametrize('several', [False, True])
@pytest.mark.parametrize('network', ['', 'second/'])
def test_a_network_that_detects_nothing(tmp_path, network, several):
    """No best checkpoint of this epoch, and a word; the next one has one."""
    key = f'{network}toy/falling'
    cfg = config(
        tmp_path,
        epochs=2,
        save_best=[key, 'other/x'] if several else key,
        rule='less',
    )
    cfg.val_evaluator = dict(type='ToyFalling', prefix='toy')

    class Measured(Hook):
        priority = 'ABOVE_NORMAL'

        def after_val_epoch(self, runner, metrics=None):
            metrics['second/toy/falling'] = 1.0
            metrics['other/x'] = 1.0

    runner = toy.train(cfg, Measured(), Nothing(key))
    name = key.replace('/', '_')
    best = [path.name for path in tmp_path.glob(f'best_{name}*')]
    assert best == [f'best_{name}_epoch_2.pth']
    (log,) = tmp_path.glob('*/*.log')
    text = log.read_text()
    assert text.count(f'save_best: this validation gave no "{key}"') == 1
    assert (tmp_path / 'epoch_2.pth').exists()
    assert runner.epoch == 2


def test_auto_takes_no_metric_of_another_network(tmp_path):
    cfg = config(tmp_path, epochs=2, save_best='auto', rule='less')
    cfg.val_evaluator = dict(type='ToyFalling', prefix='toy')

    class Measured(Hook):
        priority = 'ABOVE_NORMAL'

        def after_val_epoch(self, runner, metrics=None):
            metrics['ensemble/toy/falling'] = 1.0

    toy.train(cfg, Measured(), Nothing('toy/'))
    best = [path.name for path in tmp_path.glob('best_*')]
    assert best == ['best_toy_falling_epoch_2.pth']


def test_a_misspelt_metric(tmp_path):
    cfg = config(tmp_path, epochs=1, save_best='toy/faling', rule='less')
    cfg.val_evaluator = dict(type='ToyFalling', prefix='toy')
    with pytest.raises(
        ConfigError, match=r'no "toy/faling"\. Did you mean "toy/falling"'
    ):
        toy.train(cfg)


def test_the_former_best_goes_last(tmp_path, trace):
    cfg = config(tmp_path, epochs=2, save_best='falling', rule='less')
    cfg.val_evaluator = dict(type='ToyFalling')
    best = 'best_falling_epoch_{}.pth'  # each is better than the former
    toy.train(copy.deepcopy(cfg))
    assert trace == [
        renamed('epoch_1.pth'),
        pointed(),
        renamed(best.format(1)),
        renamed('epoch_1.pth'),
        pointed(),
        renamed('epoch_2.pth'),
        pointed(),
        ('remove', 'epoch_1.pth'),
        renamed(best.format(2)),
        renamed('epoch_2.pth'),
        pointed(),
        ('remove', best.format(1)),
    ]
    assert sorted(p.name for p in tmp_path.glob('*.pth')) == [
        best.format(2),
        'epoch_2.pth',
    ]
    # The best is found and replaced by a run that resumes.
    cfg.train_cfg.max_epochs, cfg.resume = 3, True
    trace.clear()
    toy.train(cfg)
    assert trace[-1] == ('remove', best.format(2))
    assert sorted(p.name for p in tmp_path.glob('*.pth')) == [
        best.format(3),
        'epoch_3.pth',
    ]
