"""Save, point to it, remove: in this order, and each step whole."""

import copy
import functools
import sys
from pathlib import Path

import pytest

from mmkd.engine.hooks import SafeCheckpointHook
from tests.helpers import toy

TRACE = []
TRACING = []


@functools.cache
def start_tracing():
    """Let Python report each renaming and removal of a checkpoint."""

    def audit(event, arguments):
        if TRACING and event in ('os.rename', 'os.remove'):
            names = [Path(a).name for a in arguments[:2] if isinstance(a, str)]
            if any('.pth' in n or 'last_' in n for n in names):
                TRACE.append((event.removeprefix('os.'), *names))

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
    return ('rename', f'{name}.tmp', name)


def pointed():
    return renamed('last_checkpoint')


def test_the_runner_puts_it_in_the_stock_hook_s_place(tmp_path):
    for kind in ('CheckpointHook', 'mmengine.CheckpointHook'):
        cfg = config(tmp_path)
        cfg.default_hooks.checkpoint.type = kind
        hooks = toy.build(cfg).hooks
        assert [type(h) for h in hooks if hasattr(h, 'save_best')] == [
            SafeCheckpointHook
        ]


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
