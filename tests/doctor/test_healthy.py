"""The doctor is silent on what is shipped, at small scale."""

import copy

import pytest
import test_configs
import torch
import toy
from mmengine.config import Config

from mmkd.doctor import diagnose
from mmkd.teacher_source import load_config

pytestmark = pytest.mark.usefixtures('shared_data')
FAMILIES = (
    'bccd/distilled.py',
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            'bccd/colad.py',
            'bccd/lad.py',
            *(
                f'bccd/methods/{method}.py'
                for method in (
                    *('crosskd', 'cwd', 'dist', 'dkd', 'fbkd', 'fgd'),
                    *('hint', 'kd', 'ld', 'mgd', 'pkd', 'tat'),
                )
            ),
            'cwd_retinanet_r50.py',
            'dkd_faster_rcnn_r50.py',
        )
    ),
)


@pytest.mark.parametrize('name', FAMILIES)
def test_nothing_is_found(name, tmp_path, monkeypatch):
    monkeypatch.chdir(toy.ROOT)
    cfg = test_configs.small(Config.fromfile(toy.ROOT / 'configs' / name))
    if cfg.distillation.get('teacher'):
        described = test_configs.described(cfg)
        teacher = test_configs.small(load_config(described['config']))
        torch.manual_seed(1)
        network = toy.detector(copy.deepcopy(teacher.model))
        path = tmp_path / 'teacher.pth'
        torch.save(dict(state_dict=network.state_dict()), path)
        cfg.distillation.teacher = dict(
            config=toy.teacher_config(teacher), checkpoint=str(path)
        )
    for peer in cfg.distillation.get('peers', {}).values():
        theirs = test_configs.small(load_config(peer['config']))
        peer['config'] = toy.teacher_config(theirs)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    report = diagnose(cfg)
    assert not report.findings
    assert 'the plain step, bit for bit' in report.text()
