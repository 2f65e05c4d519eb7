"""The ensemble of networks that train together, in real runs."""

import copy

import pytest
from mmengine.config import Config
from mmengine.hooks import Hook

from mmkd.errors import ConfigError
from tests.helpers import toy
from tests.peers.test_peer import peer_config


def config(work_dir, **options):
    cfg = toy.plain(work_dir, toy.RETINANET, images=4)
    cfg.runner_type = toy.RUNNER
    cfg.model.test_cfg.score_thr = 0.0
    cfg.model.bbox_head.init_cfg = dict(type='Normal', layer='Conv2d', std=0.3)
    cfg.distillation = dict(
        peers=dict(big=dict(config=peer_config(cfg))),
        methods=dict(m=dict(type='mmkd.MutualLearning')),
    )
    cfg.custom_hooks = [dict(type='mmkd.EnsembleValidationHook', **options)]
    return cfg


def metrics_of(model, cfg):
    """On the validation data, by a runner of its own."""
    alone = copy.deepcopy(cfg)
    for key in ('runner_type', 'distillation', 'custom_hooks'):
        alone.pop(key)
    alone.model = model
    return toy.build(alone).val()


@pytest.mark.parametrize('fusion', ['boxes', 'logits'])
def test_the_saved_networks_give_the_logged_metrics(tmp_path, fusion):
    cfg = config(tmp_path, fusion=fusion)
    record = toy.Record()
    toy.train(cfg, record)
    (logged,) = record.metrics
    peer = Config.fromfile(tmp_path / 'big' / 'config.py')
    student = dict(
        model=cfg.model.to_dict(),
        test_dataloader=cfg.test_dataloader.to_dict(),
    )
    ensemble = dict(
        type='mmkd.EnsembleDetector',
        fusion=fusion,
        members=[
            dict(config=student, checkpoint=str(tmp_path / 'epoch_1.pth')),
            dict(
                config=peer.to_dict(),
                checkpoint=str(tmp_path / 'big' / 'epoch_1.pth'),
            ),
        ],
    )
    expected = metrics_of(ensemble, cfg)
    assert len(expected) >= 6
    for key, value in expected.items():
        assert logged[f'ensemble/{key}'] == value
    assert {'coco/bbox_mAP', 'big/coco/bbox_mAP'} <= set(logged)


def test_each_network_s_results_and_best_weights_are_its_own(tmp_path):
    """Of a metric that names the peer, which is best in the first epoch."""
    cfg = config(tmp_path)
    cfg.train_cfg.max_epochs = 2
    cfg.val_evaluator.outfile_prefix = str(tmp_path / 'results')
    cfg.default_hooks.checkpoint.update(
        save_best='big/coco/bbox_mAP', rule='less', max_keep_ckpts=1
    )

    class Better(Hook):
        def after_val_epoch(self, runner, metrics=None):
            metrics['big/coco/bbox_mAP'] = 1.0 - runner.epoch

    toy.train(cfg, Better())
    written = [
        tmp_path / f'results{name}.bbox.json'
        for name in ('', '.big', '.ensemble')
    ]
    texts = {path.read_text() for path in written}
    assert len(texts) == 3
    best = 'best_big_coco_bbox_mAP_epoch_2.pth'
    for folder in ('', 'big'):
        kept = sorted(path.name for path in (tmp_path / folder).glob('*.pth'))
        assert kept == [best, 'epoch_2.pth']
        saved, last = (
            toy.load(tmp_path / folder / name)['state_dict'] for name in kept
        )
        assert toy.same(saved, last)


def test_it_changes_no_training(tmp_path):
    states = []
    for number in range(2):
        cfg = config(tmp_path / str(number))
        cfg.train_cfg.max_epochs = 2
        if number:
            cfg.custom_hooks = []
        model = toy.train(cfg).model
        states.append(
            (dict(model.state_dict()), [m.training for m in model.modules()])
        )
    assert toy.same(*states)


class TestBadMembers:
    def test_a_misspelt_name(self, tmp_path):
        with pytest.raises(ConfigError, match='Did you mean "big"'):
            toy.train(config(tmp_path, members=['student', 'bigg']))

    def test_one_alone(self, tmp_path):
        with pytest.raises(ConfigError, match='at least two members'):
            toy.train(config(tmp_path, members=['student']))

    def test_without_peers(self, tmp_path):
        cfg = config(tmp_path)
        cfg.distillation = dict(
            teacher=toy.untrained(cfg), methods=dict(hint=toy.HINT)
        )
        with pytest.raises(ConfigError, match='at least two members'):
            toy.train(cfg)
