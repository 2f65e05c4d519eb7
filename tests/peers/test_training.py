"""Networks that train together: processes, half precision, checkpointing."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook

from mmkd.errors import NonFiniteLossError
from tests.engine.test_distributed import close, launch, records
from tests.helpers import (
    toy,
    toy_distributed,  # noqa: F401
)
from tests.peers import test_peer as test_peers

GFL = 'gfl/gfl_r50_fpn_1x_coco.py'
SEVERAL = dict(type='mmkd.OneTeacherSeveralStudents')
METHODS = {
    'dml': dict(type='mmkd.MutualLearning', box_weight=1.0),
    'online': SEVERAL,
    'offline': SEVERAL,
    'dcm': dict(
        type='mmkd.DCM', stages=['backbone.layer2', 'backbone.layer3']
    ),
    'ffsd': dict(type='mmkd.FFSD', module_weight=1.0, ramp_epochs=0),
}
# Two processes per network and method take their time on two cores.
EACH = [
    pytest.param(name, marks=[] if name == 'dml' else pytest.mark.slow)
    for name in METHODS
]


def config(work_dir, name, *, iterations=2):
    """Nothing random, nothing that depends on the size of the batch."""
    cfg = toy.plain(work_dir, GFL, images=2 * iterations)
    cfg.runner_type = toy.RUNNER
    # What the heads say differs from place to place.
    cfg.model.bbox_head.init_cfg = dict(
        type='Normal', layer='Conv2d', std=0.03
    )
    cfg.model.bbox_head.norm_cfg = dict(type='GN', num_groups=8)
    peer = test_peers.peer_config(cfg)
    equal = test_peers.peer_config(cfg, channels=8)
    peers = dict(big=dict(config=peer))
    if name in ('online', 'ffsd'):
        peers['second'] = dict(config=equal)
    cfg.distillation = dict(peers=peers, methods=dict(m=METHODS[name]))
    if name == 'online':
        cfg.distillation.teacher = dict(config=peer, trainable=True)
    if name == 'offline':
        cfg.distillation.teacher = dict(config=peer, checkpoint=None)
    toy.in_order(cfg)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.custom_imports = dict(
        imports=['tests.helpers.toy', 'tests.helpers.toy_distributed']
    )
    cfg.env_cfg.dist_cfg = dict(backend='gloo', timeout=1800)
    # Batch norm would see which images share a batch; so would FFSD's.
    cfg.custom_hooks = [
        dict(type='ToySaveRecord'),
        dict(type='ToyFrozenNorms'),
    ]
    return cfg


def networks(cfg):
    """The configs of all models that train."""
    peers = cfg.distillation.peers.values()
    return [cfg.model, *(peer.config.model for peer in peers)]


@pytest.mark.parametrize('name', EACH)
def test_two_processes_are_one(tmp_path, name):
    two = config(tmp_path / 'two', name)
    two.train_dataloader.batch_size = 1
    launch(tmp_path / 'two', two)
    first, second = records(tmp_path / 'two')
    one = config(tmp_path / 'one', name)
    one.train_dataloader.batch_size = 2
    toy.train(one)
    (expected,) = records(tmp_path / 'one')

    for a, b, both in zip(
        first['losses'], second['losses'], expected['losses'], strict=True
    ):
        assert a.keys() == b.keys() == both.keys()
        assert a != b  # they have seen different images
        for key in both:
            if key != 'grad_norm':
                mean = (a[key] + b[key]) / 2
                assert mean == pytest.approx(both[key], rel=2e-3), key
    # Every network and the method's layers.
    assert toy.same(first['weights'], second['weights'])
    assert first['weights'].keys() == expected['weights'].keys()
    for key, weight in expected['weights'].items():
        assert close(first['weights'][key].float(), weight.float()), key
    peers = [f'distillation.peers.{peer}' for peer in one.distillation.peers]
    start = untrained(one)
    for prefix in ('backbone', *peers):
        assert any(
            not close(weight, start[key])
            for key, weight in expected['weights'].items()
            if key.startswith(prefix)
        ), prefix


def untrained(cfg):
    """All weights before the first step."""
    cfg = copy.deepcopy(cfg)
    cfg.optim_wrapper.optimizer.lr = 0.0
    cfg.work_dir += '_start'
    toy.train(cfg)
    (record,) = records(Path(cfg.work_dir))
    return record['weights']


@pytest.mark.parametrize('name', EACH)
def test_checkpointing_changes_nothing(tmp_path, name):
    """Gradients too, but for the order in which they are summed."""
    plain = config(tmp_path / 'plain', name)
    saving = config(tmp_path / 'saving', name)
    for model in networks(saving):
        model.backbone.with_cp = True
    for cfg in (plain, saving):
        toy.train(cfg)
    (expected,), (found,) = (
        records(tmp_path / folder) for folder in ('plain', 'saving')
    )
    for one, other in zip(found['losses'], expected['losses'], strict=True):
        assert {**one, 'grad_norm': 0} == {**other, 'grad_norm': 0}
    for key, weight in expected['weights'].items():
        torch.testing.assert_close(found['weights'][key], weight, msg=key)


@pytest.mark.parametrize('name', EACH)
def test_in_bfloat16(tmp_path, name):
    """Losses are those of single precision, within bfloat16's three digits."""
    plain = config(tmp_path / 'plain', name)
    half = config(tmp_path / 'half', name)
    half.optim_wrapper.update(type='ToyCpuAmpOptimWrapper', scale=False)
    for cfg in (plain, half):
        toy.train(cfg)
    (expected,), (found,) = (
        records(tmp_path / folder) for folder in ('plain', 'half')
    )
    assert found['losses'] != expected['losses']
    for key, loss in expected['losses'][0].items():
        if key != 'grad_norm':
            assert found['losses'][0][key] == pytest.approx(
                loss, rel=0.05, abs=1e-3
            ), key
    assert all(w.isfinite().all() for w in found['weights'].values())


@pytest.mark.parametrize('culprit', ['student', 'big'])
@pytest.mark.parametrize('name', EACH)
def test_a_network_that_diverges_is_named(tmp_path, name, culprit):
    """It alone, though it has broken what the others learn from it.

    The checkpoints of all stay as they were.
    """

    class Diverge(Hook):
        def before_train_epoch(self, runner):
            if runner.epoch == 1:
                models = {'student': runner.model}
                for peer, module in runner.distiller.peers.items():
                    models[peer] = module.model
                models[culprit].bbox_head.gfl_cls.bias.data.fill_(float('nan'))

    cfg = config(tmp_path, name)
    cfg.train_cfg.max_epochs = 2
    own = 'big.loss_cls' if culprit == 'big' else 'loss_cls'
    with pytest.raises(
        NonFiniteLossError, match=f'^{own}.* It is "{culprit}" that diverged'
    ) as caught:
        toy.train(cfg, Diverge())
    assert 'm.loss' not in str(caught.value)
    for folder in ('', *cfg.distillation.peers):
        checkpoint = toy.load(tmp_path / folder / 'epoch_1.pth')
        weights = checkpoint['state_dict'].values()
        assert all(w.isfinite().all() for w in weights)
        assert not (tmp_path / folder / 'epoch_2.pth').exists()
