"""The flagship configs as they are, through the training tool."""

import os
import subprocess
import sys

import pytest

from tests.helpers import made_data, toy

SMALL = [
    'distillation.teacher.checkpoint=None',  # no download
    'model.backbone.init_cfg=None',
    'train_cfg.max_epochs=1',
    'train_dataloader.dataset.indices=4',
    'train_dataloader.dataset.pipeline.2.scale=(160,128)',
    'val_dataloader.dataset.indices=2',
    'val_dataloader.dataset.pipeline.1.scale=(160,128)',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'val_dataloader.num_workers=0',
    'val_dataloader.persistent_workers=False',
    'default_hooks.logger.interval=1',
]
LOAD = """
import sys
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.hub import get_config

register_all_modules()
model = MODELS.build(get_config(sys.argv[1]).model)
checkpoint = torch.load(sys.argv[2], weights_only=False)
model.load_state_dict(checkpoint['state_dict'], strict=True)
assert 'mmkd' not in sys.modules
"""


@pytest.mark.parametrize(
    ('config', 'stock', 'losses'),
    [
        (
            'faster_rcnn_kd_r50',
            'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
            ('frcnn.loss_rcn_soft', 'frcnn.loss_hint'),
        ),
        ('lad_r50', 'mmdet::paa/paa_r50_fpn_1x_coco.py', ('loss_iou',)),
    ],
)
def test_flagship(tmp_path, config, stock, losses):
    """On COCO's layout; the checkpoint is the stock model's."""
    for name in ('configs', 'tools'):
        (tmp_path / name).symlink_to(toy.ROOT / name)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'coco').symlink_to(made_data.root() / 'coco_tiny')
    env = {
        **os.environ,
        'OMP_NUM_THREADS': '1',
        'PYTHONPATH': str(toy.ROOT),
    }
    run = subprocess.run(
        [
            *(sys.executable, 'tools/train.py', f'configs/{config}.py'),
            *('--work-dir', 'run', '--cfg-options', *SMALL),
        ],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert all(name in run.stdout for name in losses)
    assert 'Epoch(val) [1]' in run.stdout
    loaded = subprocess.run(
        [sys.executable, '-c', LOAD, stock, 'run/epoch_1.pth'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert loaded.returncode == 0, loaded.stderr[-3000:]


@pytest.mark.parametrize('tool', ['train', 'test', 'doctor'])
def test_a_config_that_does_not_exist(tool):
    """One line, no traceback."""
    arguments = ['configs/none.py', *['none.pth'] * (tool == 'test')]
    done = subprocess.run(
        [sys.executable, f'tools/{tool}.py', *arguments],
        cwd=toy.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert 'Traceback' not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the config 'configs/none.py' does not")
