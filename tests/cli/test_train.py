"""The flagship configs as they are, through the training tool."""

import os
import subprocess
import sys

import pytest
from mmengine.config import Config
from mmengine.runner import FlexibleRunner, Runner

from mmkd.cli import main
from mmkd.cli.train import load_config, parse_args
from mmkd.engine.runner import DistillationRunner, check_runner
from mmkd.errors import ConfigError
from tests.helpers import made_data, new_style, toy

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


@pytest.mark.parametrize('runner', [None, toy.RUNNER])
def test_what_a_resumed_run_would_forget_is_said(tmp_path, runner):
    """Once, at the start, where MMEngine's runner trains."""
    cfg = toy.plain(tmp_path / 'run', toy.RETINANET, images=2)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    if runner:
        cfg.runner_type = runner
    path = toy.write(cfg, tmp_path / 'config.py')
    job = toy.tool(tmp_path / 'log', 'tools/train.py', path)
    assert job.process.exitcode == 0, job.text()
    text = 'Runner resumes weights, the optimiser and schedules, and nothing'
    assert job.text().count(text) == (runner is None)


@pytest.mark.parametrize(
    'seed', ['-1', '4294967296', '4294967295', 'abc', '1.5', 'True', '9' * 99]
)
@pytest.mark.parametrize('runner', [None, 'mmkd.DistillationRunner'])
def test_impossible_seeds(tmp_path, seed, runner, capsys):
    make = toy.distilled if runner else toy.plain
    cfg = make(tmp_path / 'run')
    cfg.runner_type = runner
    path = str(toy.write(cfg, tmp_path / 'c.py'))
    words = ['--work-dir', str(tmp_path / 'run')]
    words += ['--cfg-options', f'randomness.seed={seed}']
    commands = [['train', path, *words], ['test', path, path, *words]]
    if runner:
        commands.append(['doctor', path, *words[2:]])
    for command in commands:
        assert main(command) == 1
        told = ''.join(capsys.readouterr())  # the doctor prints a finding
        assert 'Traceback' not in told
        assert (
            'randomness.seed must be a whole number from 0 to 4294901759, or '
            'None for one that is drawn, got '
        ) in ' '.join(told.split())


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'needs the key "model"'),
        ('model = "ä"'.encode('latin-1'), 'UnicodeDecodeError: '),
        (b'\xef\xbb\xbfmodel = dict()', 'U+FEFF'),
        (b'model = dict()\r\nx = 1 / 0', 'division by zero ({}, line 2)'),
        (b'model = cat', "NameError: name 'cat' is not defined ({}, line 1)"),
        (b'model = 3', 'must be a dict such as dict(type=...), got 3'),
        (b'model = ' + b'[' * 9000, 'cannot be read'),
        (b'model = ' + b'9' * 5000, 'cannot be read'),
        (b'_base_ = "none.py"\nmodel = dict()', 'cannot be read'),
        (b'_base_ = 3\nmodel = dict()', 'cannot be read'),
        (b'\0', 'cannot be read'),
    ],
)
def test_configs_that_are_none(tmp_path, content, message, capsys):
    path = tmp_path / 'c.py'
    path.write_bytes(content)
    for command in (
        ['train', path],
        ['test', path, path],
        ['doctor', path],
        ['benchmark', 'step', path],
    ):
        assert main([*map(str, command)]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith('error: ')
        assert message.format(path) in error


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


class Own(DistillationRunner):
    """A runner of one's own."""


class TestRunner:
    """Whoever ignores `distillation` does not train a config that has it."""

    @pytest.mark.parametrize(
        'kind',
        [
            'FlexibleRunner',
            'mmengine.runner.FlexibleRunner',
            FlexibleRunner,
            'Runner',
            Runner,
            None,
        ],
    )
    def test_one_that_does_not_distil(self, tmp_path, kind):
        cfg = toy.distilled(tmp_path / 'run', toy.RETINANET)
        cfg.runner_type = kind
        name = 'FlexibleRunner' if 'Flex' in str(kind) else 'Runner'
        with pytest.raises(
            ConfigError,
            match=rf'x\.py has `distillation`, but .*: {name} would train '
            r"without it\. Set runner_type='mmkd\.DistillationRunner'",
        ):
            check_runner(cfg, 'x.py')
        # Without distillation, every runner may train.
        cfg.distillation = None
        check_runner(cfg, 'x.py')

    def test_the_command_asks(self, tmp_path):
        cfg = toy.distilled(tmp_path / 'run', toy.RETINANET)
        cfg.runner_type = 'FlexibleRunner'
        path = toy.write(cfg, tmp_path / 'config.py')
        with pytest.raises(ConfigError, match='FlexibleRunner would train'):
            load_config(parse_args([str(path)]))

    @pytest.mark.parametrize(
        'kind',
        [
            'mmkd.DistillationRunner',
            'DistillationRunner',
            'mmkd.engine.runner.DistillationRunner',
            DistillationRunner,
            Own,
        ],
    )
    def test_one_that_does(self, kind):
        check_runner(
            Config(dict(runner_type=kind, distillation=dict(a=1))), ''
        )

    def test_one_that_does_not_exist(self):
        cfg = Config(dict(runner_type='mmkd.DistilationRunner'))
        with pytest.raises(
            ConfigError, match=r'Did you mean "mmkd\.DistillationRunner"'
        ):
            check_runner(cfg, 'x.py')


def test_a_config_whose_types_are_classes(tmp_path):
    """It is read lazily, with read_base(); what it writes can be read again.

    All that mmkd does by a type's name it does by the class as well.
    """
    path = new_style.write(tmp_path)
    job = toy.tool(
        tmp_path / 'log', 'tools/train.py', path, '--work-dir', tmp_path / 'a'
    )
    assert job.process.exitcode == 0, job.text()[-3000:]
    text = job.text()
    assert ') SafeCheckpointHook' in text
    assert ') CheckpointHook' not in text
    assert 'hint.loss_hint: ' in text
    assert 'Telemetry: ' in text
    assert [p.name for p in (tmp_path / 'a').glob('*.pth')] == ['epoch_2.pth']
    spoken = [line for line in text.splitlines() if 'Epoch(train)' in line]
    # A schedule warms up from 0, and stops: the log stops with it.
    assert ['hint.loss_hint' in line for line in spoken] == [
        False,
        True,
        True,
        False,
    ]

    written = tmp_path / 'a' / path.name
    job = toy.tool(
        tmp_path / 'log',
        'tools/test.py',
        *(written, tmp_path / 'a' / 'epoch_2.pth', '--tta'),
        *('--json-prefix', tmp_path / 'found'),
    )
    assert job.process.exitcode == 0, job.text()[-3000:]
    assert (tmp_path / 'found.bbox.json').exists()
