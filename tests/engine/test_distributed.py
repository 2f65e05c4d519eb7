"""Two processes on the CPU train like one with the doubled batch."""

import copy
import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
import torch

from mmkd.engine.work_dir import LOCK
from tests.helpers import toy


def config(work_dir, *, iterations=3, **options):
    """Nothing random, nothing that depends on the size of the batch."""
    cfg = toy.distilled(work_dir, images=2 * iterations, **options)
    cfg.custom_imports = dict(imports=['tests.helpers.toy'])
    cfg.env_cfg.dist_cfg = dict(backend='gloo', timeout=1800)
    cfg.model.backbone.norm_eval = True
    for stage in (cfg.model.train_cfg.rpn, cfg.model.train_cfg.rcnn):
        stage.sampler.type = 'ToyFirstSampler'
        stage.sampler.num = 16
    # MMDetection counts an image without positive anchors as if it had one.
    cfg.model.train_cfg.rpn.assigner.min_pos_iou = 0.0
    cfg.distillation.teacher = toy.untrained(cfg)
    toy.in_order(cfg)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.custom_hooks = [dict(type='ToySaveRecord')]
    return cfg


def free_port():
    with socket.socket() as one:
        one.bind(('127.0.0.1', 0))
        return one.getsockname()[1]


def launch(folder, cfg, *arguments, processes=2, status=0, **env):
    """Run the training tool in processes, as torchrun starts them."""
    path = toy.write(cfg, folder / 'config.py')
    port = str(free_port())
    jobs = [
        toy.Job(
            folder / f'log{rank}',
            'tools/train.py',
            path,
            '--launcher',
            'pytorch',
            *arguments,
            env=dict(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(processes),
                MASTER_ADDR='127.0.0.1',
                MASTER_PORT=port,
                **env,
            ),
        )
        for rank in range(processes)
    ]
    for job in jobs:
        assert job.wait() == status, job.text()[-3000:]
    return jobs


def records(folder):
    return [toy.load(p) for p in sorted(folder.glob('record_*.pth'))]


def close(a, b):
    if a is None or b is None:
        return a is b
    return torch.allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('method', [toy.FRCNN, toy.HINT], ids=['kd', 'hint'])
def test_two_are_one(tmp_path, method):
    two = config(tmp_path / 'two', methods={'kd': method})
    two.train_dataloader.batch_size = 1
    two.custom_hooks.append(dict(type='mmkd.TelemetryHook', interval=1))
    launch(tmp_path / 'two', two)
    first, second = records(tmp_path / 'two')

    one = config(tmp_path / 'one', methods={'kd': method})
    one.train_dataloader.batch_size = 2
    toy.train(one)
    (expected,) = records(tmp_path / 'one')

    assert len(first['losses']) == len(expected['losses']) == 3
    for a, b, both in zip(
        first['losses'], second['losses'], expected['losses'], strict=True
    ):
        assert a.keys() == b.keys() == both.keys()
        assert any(key.startswith('kd.loss') for key in both)
        assert a != b  # they have seen different images
        for key in both:
            if key != 'grad_norm':
                mean = (a[key] + b[key]) / 2
                assert mean == pytest.approx(both[key], rel=1e-3), key
    for a, b, both in zip(
        first['gradients'],
        second['gradients'],
        expected['gradients'],
        strict=True,
    ):
        assert toy.same(a, b)
        assert all(map(close, a, both))
    # Student and adapters: equal on both, and those of the one process.
    assert toy.same(first['weights'], second['weights'])
    names = [n for n in first['weights'] if n.startswith('distillation.')]
    assert len(names) == 10
    assert first['weights'].keys() == expected['weights'].keys()
    for name, value in expected['weights'].items():
        assert close(first['weights'][name].float(), value.float()), name


@pytest.mark.parametrize('static_graph', [False, True])
def test_checkpointed_blocks(tmp_path, static_graph):
    """Measuring within them leaves the processes in step."""
    weights = []
    for measured in (True, False):
        folder = tmp_path / str(measured)
        cfg = config(folder, methods={'hint': toy.HINT})
        cfg.model.backbone.update(with_cp=True, frozen_stages=0)
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel', static_graph=static_graph
        )
        off = dict(type='ToyReachUnchecked')
        on = dict(type='mmkd.TelemetryHook', interval=1)
        cfg.custom_hooks.append(on if measured else off)
        launch(folder, cfg)
        first, second = records(folder)
        assert toy.same(first['weights'], second['weights'])
        assert toy.same(first['gradients'], second['gradients'])
        weights.append(first['weights'])
    assert toy.same(*weights)


def test_a_method_that_does_not_move_the_student(tmp_path):
    """Both processes stop."""
    inner = dict(toy.HINT, source='backbone.layer4.1.conv2')
    cfg = config(tmp_path, methods={'hint': inner}, iterations=2)
    cfg.model.backbone.with_cp = True
    for job in launch(tmp_path, cfg, status=1):
        assert 'distillation.methods.hint: no gradient' in job.text()
        assert 'works is "backbone.layer4.1"' in job.text()


def test_a_method_that_stops_does_not_hang(tmp_path):
    cfg = config(
        tmp_path,
        iterations=4,
        methods={
            'a': toy.HINT,
            'b': toy.FRCNN,
            'off': dict(toy.HINT, loss_weight=0.0),
        },
    )
    cfg.train_dataloader.batch_size = 1
    cfg.custom_hooks += [
        dict(type='mmkd.WeightScheduleHook', methods=['a'], stop_at=2),
        dict(type='mmkd.WeightScheduleHook', methods=['b'], stop_at=3),
        dict(type='EMAHook'),
    ]
    launch(tmp_path, cfg)
    first, second = records(tmp_path)
    assert toy.same(first['weights'], second['weights'])
    names = [
        {key.partition('.')[0] for key in losses if '.' in key}
        for losses in first['losses']
    ]
    assert names == [
        {'a', 'b', 'idle'},
        {'a', 'b', 'idle'},
        {'b', 'idle'},
        {'idle'},
    ]
    assert all(losses['idle.loss'] == 0 for losses in first['losses'])
    checkpoint = toy.load(tmp_path / 'epoch_1.pth')
    assert len(checkpoint['distillation']['random_states']) == 2


@pytest.mark.parametrize('accumulated', [1, 3])
def test_resumed(tmp_path, accumulated):
    """With everything random again, and a validation by both.

    With three batches a step the epoch ends between two steps, and the
    gradients of the two processes differ.
    """

    def run(folder, *arguments):
        cfg = toy.distilled(
            folder, methods={'kd': toy.FRCNN}, epochs=2, images=6
        )
        cfg.env_cfg.dist_cfg = dict(backend='gloo')
        cfg.randomness = dict(seed=3, diff_rank_seed=True)
        cfg.optim_wrapper.accumulative_counts = accumulated
        launch(folder, cfg, *arguments)

    run(tmp_path / 'a')
    (tmp_path / 'b').mkdir()
    shutil.copy(tmp_path / 'a' / 'epoch_1.pth', tmp_path / 'b')
    run(tmp_path / 'b', '--resume')
    expected, resumed = (
        toy.load(tmp_path / name / 'epoch_2.pth') for name in 'ab'
    )
    for key in ('state_dict', 'optimizer', 'distillation'):
        assert toy.same(expected[key], resumed[key]), key
    for kept in toy.load(tmp_path / 'a' / 'epoch_1.pth'), resumed:
        one, other = kept['distillation']['memories']
        assert len(one['gradients']) == len(other['gradients'])
        if one['gradients']:
            assert accumulated > 1
            assert not toy.same(one['gradients'], other['gradients'])
    states = resumed['distillation']['random_states']
    assert len(states) == 2
    assert not toy.same(states[0]['torch'], states[1]['torch'])


def test_resumed_by_another_number_of_processes(tmp_path):
    cfg = config(tmp_path, methods={'hint': toy.HINT}, iterations=1)
    launch(tmp_path, cfg)
    cfg.resume = True
    path = toy.write(cfg, tmp_path / 'config.py')
    job = toy.tool(tmp_path / 'log', 'tools/train.py', path)
    assert job.process.exitcode == 0, job.text()
    assert 'it was saved by 2 processes' in job.text()


def test_the_teacher_is_checked_by_both(tmp_path):
    from tests.engine.hooks.test_teacher_check import (
        expected_metrics,
        teacher_of,
    )

    cfg = toy.distilled(tmp_path, toy.RETINANET, images=2)
    cfg.env_cfg.dist_cfg = dict(backend='gloo')
    cfg.custom_imports = dict(
        imports=['tests.engine.hooks.test_teacher_check']
    )
    teacher, path = teacher_of(tmp_path, toy.RETINANET, 'Oracle')
    cfg.distillation.teacher = dict(
        config=toy.teacher_config(teacher), checkpoint=str(path)
    )
    cfg.val_dataloader.batch_size = 1
    cfg.custom_hooks = [dict(type='mmkd.TeacherCheckHook', evaluate=3)]
    jobs = launch(tmp_path, cfg)
    expected = expected_metrics(tmp_path, 3)['coco/bbox_mAP']
    text = f'The teacher on 3 validation images: coco/bbox_mAP: {expected:.4g}'
    assert text in jobs[0].text()


def dist_train(*arguments, **environment):
    return subprocess.Popen(
        ['bash', 'tools/dist_train.sh', *map(str, arguments)],
        cwd=toy.ROOT,
        env={
            **os.environ,
            'PYTHON': sys.executable,
            'PYTHONPATH': str(toy.ROOT),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_script(tmp_path):
    cfg = config(tmp_path / 'run', methods={'hint': toy.HINT}, iterations=1)
    path = toy.write(cfg, tmp_path / 'config.py')
    with dist_train(path, 2, '--cfg-options', 'train_cfg.max_epochs=2') as job:
        out, _ = job.communicate()
    assert job.returncode == 0, out[-3000:]
    assert (tmp_path / 'run' / 'epoch_2.pth').exists()
    assert len(records(tmp_path / 'run')) == 2


STOPS = {
    'loss of one process': (
        dict(type='ToySpoilOne', rank=1, what='loss'),
        r'error: loss_rpn_cls.* is NaN or infinite in process 1; training '
        r'stopped before the optimiser used it\.',
    ),
    'buffer of the first': (
        dict(type='ToySpoilOne', rank=0, what='buffer'),
        r'error: the checkpoint of iteration \d is not saved, because '
        r'state_dict: backbone\.bn1\.running_var holds',
    ),
    'another training': (None, 'error: another training is at work in'),
}


@pytest.mark.parametrize(
    'stop',
    [
        pytest.param(stop, marks=[pytest.mark.slow] * ('buffer' in stop))
        for stop in STOPS
    ],
)
def test_all_processes_stop_with_one_message(tmp_path, stop):
    hook, text = STOPS[stop]
    cfg = config(tmp_path / 'run', methods={'hint': toy.HINT})
    cfg.custom_hooks = [hook] if hook else []
    (tmp_path / 'run').mkdir()
    if not hook:  # so that nobody sees before the start who it is
        lock = (tmp_path / 'run' / LOCK).open('w')
        fcntl.flock(lock, fcntl.LOCK_EX)
    jobs = launch(tmp_path, cfg, status=1)
    first, second = (job.text() for job in jobs)
    assert re.search(text, first.strip().splitlines()[-1])
    assert 'error:' not in second
    assert 'Traceback' not in first + second
    assert not list((tmp_path / 'run').glob('*.pth'))


@pytest.mark.slow
def test_two_scripts_at_once_and_an_error_in_one_process(tmp_path):
    """Each finds a free port; a process that fails ends the others."""
    jobs = []
    for name in ('a', 'b'):
        cfg = config(tmp_path / name / 'run', methods={'hint': toy.HINT})
        if name == 'b':
            cfg.custom_hooks.append(dict(type='ToyFailSecond'))
        path = toy.write(copy.deepcopy(cfg), tmp_path / name / 'config.py')
        jobs.append(dist_train(path, 2))
    (good, _), (bad, _) = (job.communicate() for job in jobs)
    assert jobs[0].returncode == 0, good[-3000:]
    assert jobs[1].returncode != 0
    assert 'hint.loss_hint is NaN or infinite' in bad
