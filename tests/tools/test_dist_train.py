"""Two processes on the CPU, started as users start them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import (
    toy,
    toy_distributed,  # noqa: F401
)


def config(folder: Path, batch: int, **methods):
    """Runs whose batches can be compared: nothing in them is random."""
    cfg = toy.distilled(
        folder, methods=methods or {'frcnn': toy.FRCNN}, images=8, batch=batch
    )
    cfg.custom_imports = dict(
        imports=['tests.helpers.toy', 'tests.helpers.toy_distributed']
    )
    cfg.custom_hooks = [dict(type='ToyWriteLosses', folder=str(folder))]
    # Statistics and paddings of a batch would depend on its size.
    cfg.model.backbone.norm_eval = True
    loader = cfg.train_dataloader
    loader.batch_sampler = None
    for step in loader.dataset.pipeline:
        if step.type == 'Resize':
            step.keep_ratio = False
        if step.type == 'RandomFlip':
            step.prob = 0.0
    for stage in (cfg.model.train_cfg.rpn, cfg.model.train_cfg.rcnn):
        stage.sampler.type = 'ToyFirstSampler'
        stage.sampler.num = 16
    # MMDetection counts an image without positive anchors as if it had one.
    cfg.model.train_cfg.rpn.assigner.min_pos_iou = 0.0
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    return cfg


def run(cfg, processes: int, *arguments: str) -> subprocess.CompletedProcess:
    folder = Path(cfg.work_dir)
    path = toy.write(cfg, folder / 'config.py')
    paths = [str(toy.ROOT), os.environ.get('PYTHONPATH', '')]
    env = {
        **os.environ,
        'PYTHON': sys.executable,
        'PYTHONPATH': os.pathsep.join(filter(None, paths)),
    }
    if processes == 1:
        start = [sys.executable, 'tools/train.py', str(path)]
    else:
        start = ['bash', 'tools/dist_train.sh', str(path), str(processes)]
    return subprocess.run(
        [*start, *arguments],
        cwd=toy.ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def losses(cfg, rank: int) -> list[dict[str, float]]:
    return json.loads((Path(cfg.work_dir) / f'rank{rank}.json').read_text())


@pytest.mark.slow
def test_two_processes_are_one_with_the_doubled_batch(tmp_path):
    one = config(tmp_path / 'one', batch=2)
    two = config(tmp_path / 'two', batch=1)
    for cfg, processes in ((one, 1), (two, 2)):
        done = run(cfg, processes)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    first, second = losses(two, 0), losses(two, 1)
    assert len(losses(one, 0)) == len(first) == len(second) == 4
    for whole, a, b in zip(losses(one, 0), first, second, strict=True):
        assert any('frcnn.loss_' in key for key in whole)
        assert a['weights'] == b['weights']  # all parameters are in step
        assert a['adapters'] == b['adapters'] > 0
        # The processes see other images, so their own losses differ.
        assert a['frcnn.loss_rcn_soft'] != b['frcnn.loss_rcn_soft']
        mean = {key: (a[key] + b[key]) / 2 for key in whole}
        assert mean == pytest.approx(whole, rel=2e-4, abs=1e-5)


@pytest.mark.slow
def test_a_method_that_stops_does_not_hang_the_others(tmp_path):
    cfg = config(tmp_path, batch=1, hint=toy.HINT, off=idle())
    cfg.custom_hooks.append(dict(type='mmkd.WeightScheduleHook', stop_at=2))
    done = run(cfg, 2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    named = [
        [key for key in line if key.startswith('hint.')]
        for line in losses(cfg, 1)
    ]
    assert [len(keys) for keys in named] == [1, 1, 0, 0]


def idle():
    return dict(type='mmkd.FeatureHint', loss_weight=0.0)


@pytest.mark.slow
def test_two_processes_test_like_one(tmp_path):
    cfg = config(tmp_path, batch=2)
    cfg.train_cfg.max_epochs = 1
    # Processes share out the images, and a batch is padded to its largest.
    cfg.test_dataloader.batch_size = 1
    assert run(cfg, 1).returncode == 0
    config_path = tmp_path / 'config.py'
    checkpoint = tmp_path / 'epoch_1.pth'
    results = []
    for processes in (1, 2):
        prefix = tmp_path / f'result{processes}'
        arguments = [str(config_path), str(checkpoint)]
        start = [sys.executable, 'tools/test.py', *arguments]
        if processes == 2:
            start = ['bash', 'tools/dist_test.sh', *arguments, '2']
        done = subprocess.run(
            [
                *(*start, '--json-prefix', str(prefix)),
                *('--cfg-options', 'model.test_cfg.rcnn.score_thr=0.0'),
            ],
            cwd=toy.ROOT,
            env={
                **os.environ,
                'PYTHON': sys.executable,
                'PYTHONPATH': str(toy.ROOT),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        result = json.loads(Path(f'{prefix}.bbox.json').read_text())
        results.append(
            sorted(
                (r['image_id'], r['category_id'], round(r['score'], 5))
                for r in result
            )
        )
    assert results[0]
    assert results[0] == results[1]


def test_usage_without_arguments():
    for script in ('dist_train.sh', 'dist_test.sh', 'slurm_train.sh'):
        done = subprocess.run(
            ['bash', f'tools/{script}'],
            cwd=toy.ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert f'tools/{script}' in done.stdout
