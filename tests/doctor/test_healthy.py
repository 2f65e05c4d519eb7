"""The doctor is silent on what is shipped, at small scale."""

import copy
import functools
import re

import mmengine.config.config
import pytest
import torch
from mmengine.config import Config

from mmkd.detectors import shrink
from mmkd.detectors.source import load_config
from mmkd.doctor import diagnose, examination
from mmkd.teachers.build import kind_of
from tests import test_configs
from tests.helpers import (
    encoders,
    faults,  # noqa: F401 registers them
    toy,
)

DISTILLED = [
    name
    for name in test_configs.ALL
    if 'distillation' in Config.fromfile(test_configs.FOLDER / name)
]
BALANCE = (
    'outweighs the task|hardly teaches|is smaller than the student|'
    'The teacher finds no object'
)
WHOLE = 'bccd/distilled.py'
"""Of this config, time and memory are measured, too."""
# An untrained teacher's boxes are its anchors: in the smallest photos, these
# overlap no blood cell as much as SoLAD asks.
SCALES = {'bccd/solad.py': (320, 240)}
SLIM = dict(
    backbone=dict(deepen_factor=0.1, widen_factor=0.125),
    neck=dict(in_channels=[32, 64, 128], out_channels=16, num_csp_blocks=1),
    bbox_head=dict(in_channels=16, feat_channels=16),
)
"""What YOLOX and RTMDet have instead of narrow stages."""


@pytest.fixture(autouse=True)
def fast(monkeypatch, request):
    monkeypatch.chdir(toy.ROOT)
    # Every base of every config asks for it again.
    found = functools.cache(mmengine.config.config.get_installed_path)
    monkeypatch.setattr(mmengine.config.config, 'get_installed_path', found)
    if WHOLE not in request.node.name:
        monkeypatch.setattr(examination, 'check_cost', lambda patient: None)


def small(cfg, name):
    """Narrow, on a few of the tests' photos."""
    cfg = test_configs.small(cfg)
    if 'widen_factor' in cfg.model.backbone:
        cfg.merge_from_dict(dict(model=SLIM))
    if name in SCALES:
        rescale(cfg.train_dataloader.dataset, SCALES[name])
    cfg.train_dataloader.dataset = test_configs.innermost(
        cfg.train_dataloader.dataset
    )
    return cfg


def rescale(dataset, scale):
    for step in dataset.pipeline:
        shrink.small_step(step, scale)


def saved(described, name, path):
    """The description of a small teacher with a checkpoint."""
    cfg = small(load_config(described['config']), name)
    torch.manual_seed(1)
    network = toy.detector(copy.deepcopy(cfg.model))
    for name, parameter in network.named_parameters():
        if name.endswith('bias'):  # as if it were trained
            torch.nn.init.normal_(parameter, float(parameter.mean()), 0.01)
    torch.save(dict(state_dict=network.state_dict()), path)
    return dict(config=toy.teacher_config(cfg), checkpoint=str(path))


def prepared(name, folder):
    """A shipped config, small, its teachers with checkpoints."""
    cfg = small(Config.fromfile(toy.ROOT / 'configs' / name), name)
    described = cfg.distillation.get('teacher')
    if described and kind_of(described) == 'FoundationEncoder':
        described.name = encoders.folder(folder)
    elif described:
        teachers = [
            saved(described, name, folder / f'{number}.pth')
            | test_configs.trainable(described)
            for number, described in enumerate(test_configs.all_described(cfg))
        ]
        several = isinstance(cfg.distillation.teacher, list)
        cfg.distillation.teacher = teachers if several else teachers[0]
    for peer in cfg.distillation.get('peers', {}).values():
        theirs = small(load_config(peer['config']), name)
        peer['config'] = toy.teacher_config(theirs)
    for split in ('val', 'test'):  # here, they would be those of training
        for part in ('dataloader', 'evaluator', 'cfg'):
            cfg[f'{split}_{part}'] = None
    return cfg


@pytest.mark.parametrize('name', DISTILLED)
def test_nothing_is_found(name, tmp_path):
    report = diagnose(prepared(name, tmp_path))
    assert not report.stops
    # Random networks say nothing about the gradients and the boxes of trained
    # ones.
    assert not [w for w in report.warns if not re.search(BALANCE, w)]
    assert 'the plain step, bit for bit' in report.text()
    assert ('Cost of' in report.text()) == (name == WHOLE)


@pytest.mark.parametrize(
    ('name', 'changes', 'expected'),
    [
        (
            'bccd/methods/hint.py',
            {'methods.hint.loss_weight': 1e9},
            'hint.loss_hint explodes',
        ),
        (
            'bccd/methods/hint.py',
            {'methods.hint.loss': dict(type='mmkd.HintLoss', loss_weight=0)},
            'hint.loss_hint teaches nothing: its value is exactly 0',
        ),
        (
            'bccd/methods/hint.py',
            {'teacher.checkpoint': None},
            'the teacher is untrained',
        ),
        (
            'bccd/peers/dml.py',
            {'methods.dml': dict(_delete_=True, type='TeachesPeersAlone')},
            'dml teaches others, but not the student',
        ),
        (
            'bccd/peers/dml.py',
            {'methods.dml': dict(_delete_=True, type='TeachesNobody')},
            'dml.loss_neck teaches nothing: its gradient is exactly 0',
        ),
    ],
)
def test_a_planted_fault_is_found(name, changes, expected, tmp_path):
    cfg = prepared(name, tmp_path)
    cfg.merge_from_dict({f'distillation.{k}': v for k, v in changes.items()})
    findings = diagnose(cfg).findings
    assert any(expected in finding for finding in findings)
