"""Networks that train beside the student, in real runs."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner

from mmkd.errors import ConfigError, NonFiniteLossError
from tests.engine.test_distributed import launch, records
from tests.engine.test_resume import assert_same_outcome
from tests.helpers import toy

COLAD = dict(type='mmkd.CoLearningAssignment')


def config(work_dir, *, methods=None, peer=None, base=toy.PAA, **options):
    """A student and a wider peer on real photos."""
    cfg = toy.plain(work_dir, base, **options)
    cfg.runner_type = toy.RUNNER
    if peer is None:
        peer = dict(config=peer_config(cfg))
    cfg.distillation = dict(
        peers=dict(big=peer),
        methods={'co': COLAD} if methods is None else methods,
    )
    return cfg


def peer_config(cfg, channels=16):
    peer = {'default_scope': 'mmdet', **toy.teacher_config(cfg)}
    peer['model']['backbone']['base_channels'] = channels
    peer['model']['neck']['in_channels'] = [channels * n for n in (1, 2, 4, 8)]
    for key in ('test_evaluator', 'test_cfg'):
        peer[key] = copy.deepcopy(cfg[key])
    return peer


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run of CoLAD over two epochs, and its record."""
    work_dir = tmp_path_factory.mktemp('colad')
    record = toy.Record()
    cfg = config(work_dir, epochs=2)
    cfg.default_hooks.checkpoint.max_keep_ckpts = 1
    toy.train(cfg, record)
    return work_dir, cfg, record


def test_losses_shares_and_metrics_are_logged(run):
    _, _, record = run
    for losses in record.losses:
        assert {'loss_cls', 'big.loss_cls', 'co.share_big'} <= set(losses)
        shares = losses['co.share_student'] + losses['co.share_big']
        assert shares == pytest.approx(1)
    for metrics in record.metrics:
        assert 'coco/bbox_mAP' in metrics
        assert 'big/coco/bbox_mAP' in metrics


def test_the_log_tells_the_size_of_every_network(run):
    work_dir, cfg, _ = run
    sizes = []
    for model in (cfg.model, cfg.distillation.peers.big.config.model):
        parameters = toy.detector(model).train().parameters()
        sizes.append(sum(p.numel() for p in parameters if p.requires_grad))
    assert 0 < sizes[0] < sizes[1]
    log = next(work_dir.glob('2*/*.log')).read_text()
    assert f'Training the student (PAA, {sizes[0]:,} weights) with co' in log
    assert f'; peers: big (PAA, {sizes[1]:,} weights)' in log


def test_every_network_has_its_stock_checkpoint(run):
    work_dir, cfg, _ = run
    files = sorted(
        str(p.relative_to(work_dir)) for p in work_dir.rglob('*.pth')
    )
    assert files == ['big/epoch_2.pth', 'epoch_2.pth']
    peer = Config.fromfile(work_dir / 'big' / 'config.py')
    for model, name in ((cfg.model, ''), (peer.model, 'big')):
        checkpoint = toy.load(work_dir / name / 'epoch_2.pth')
        toy.detector(model).load_state_dict(checkpoint['state_dict'])
        assert checkpoint['meta']['epoch'] == 2
        assert len(checkpoint['meta']['dataset_meta']['classes']) == 80


def test_a_peer_is_tested_by_its_own_config(run):
    """Its AP is that of the last validation."""
    work_dir, _, record = run
    peer = Config.fromfile(work_dir / 'big' / 'config.py')
    peer.work_dir = str(work_dir / 'tested')
    peer.load_from = str(work_dir / 'big' / 'epoch_2.pth')
    metrics = Runner.from_cfg(peer).test()
    expected = record.metrics[-1]
    assert metrics['coco/bbox_mAP'] == expected['big/coco/bbox_mAP']


def test_resumed_is_uninterrupted(run, tmp_path):
    """Networks, optimiser, statistics and the peer's own file."""
    work_dir, cfg, _ = run
    first = copy.deepcopy(cfg)
    first.work_dir = str(tmp_path)
    first.train_cfg.max_epochs = 1
    toy.train(first)
    again = copy.deepcopy(cfg)
    again.work_dir, again.resume = str(tmp_path), True
    record = toy.Record()
    toy.train(again, record)
    assert len(record.losses) == 4
    assert_same_outcome(work_dir / 'epoch_2.pth', tmp_path / 'epoch_2.pth')
    one, other = (
        toy.load(folder / 'big' / 'epoch_2.pth')['state_dict']
        for folder in (work_dir, tmp_path)
    )
    assert toy.same(dict(one), dict(other))


@pytest.mark.parametrize('norm', [0.5, 1e6], ids=['clipped', 'free'])
def test_at_zero_weight_every_network_trains_as_alone(tmp_path, norm):
    """Bit for bit, each with its own clipping, and its own learning rate."""
    methods = {'co': dict(COLAD, loss_weight=0)}
    together = config(tmp_path / 'together', methods=methods, images=4)
    together.optim_wrapper.clip_grad.max_norm = norm
    start = tmp_path / 'start.pth'
    peer_cfg = peer_config(together)
    torch.manual_seed(5)
    state = toy.detector(Config(peer_cfg).model).state_dict()
    torch.save({'state_dict': state}, start)
    optim = copy.deepcopy(together.optim_wrapper.to_dict())
    optim['optimizer']['lr'] *= 0.5
    optim['clip_grad']['max_norm'] = 2 * norm
    together.distillation.peers.big = dict(
        config=peer_cfg, checkpoint=str(start), optim_wrapper=optim
    )
    runner = toy.train(together)

    alone = toy.plain(tmp_path / 'alone', toy.PAA, images=4)
    alone.optim_wrapper.clip_grad.max_norm = norm
    alone.runner_type = toy.RUNNER
    student = toy.train(alone).model
    assert toy.same(
        dict(student.state_dict()), dict(runner.model.state_dict())
    )

    beside = toy.plain(tmp_path / 'beside', toy.PAA, images=4)
    beside.runner_type = toy.RUNNER
    beside.model = Config(peer_cfg).model
    beside.optim_wrapper = optim
    beside.load_from = str(start)
    peer = toy.train(beside).model
    assert toy.same(
        dict(peer.state_dict()),
        dict(runner.distiller.peers.big.model.state_dict()),
    )
    assert not toy.same(dict(peer.state_dict()), dict(state))


def test_two_stage_peers_do_not_shift_the_student(tmp_path):
    """A peer's samplers draw from a stream of its own."""
    plain = toy.Record()
    cfg = toy.plain(tmp_path / 'plain', images=4)
    cfg.runner_type = toy.RUNNER
    toy.train(cfg, plain)
    beside = toy.Record()
    toy.train(
        config(
            tmp_path / 'beside', base=toy.FASTER_RCNN, methods={}, images=4
        ),
        beside,
    )
    for a, b in zip(plain.losses, beside.losses, strict=True):
        assert {k: b[k] for k in a if k not in ('loss', 'grad_norm')} == {
            k: v for k, v in a.items() if k not in ('loss', 'grad_norm')
        }
    assert toy.same(plain.gradients, beside.gradients)


@pytest.mark.parametrize('method', ['colad', 'lad'])
def test_two_processes_are_one(tmp_path, method):
    """Each process' share averaged: the mean of the halves' gradients."""
    cfg = toy.plain(tmp_path / 'two', toy.PAA, images=4)
    # A map of one position has no groups to normalise.
    cfg.model.bbox_head.norm_cfg = dict(type='GN', num_groups=8)
    cfg.model.backbone.norm_eval = True
    cfg.runner_type = toy.RUNNER
    cfg.distillation = dict(
        peers=dict(big=dict(config=peer_config(cfg))),
        methods=dict(co=COLAD),
    )
    if method == 'lad':
        cfg.distillation = dict(
            teacher=toy.untrained(cfg), methods=dict(co=toy.LAD)
        )
    cfg.custom_imports = dict(imports=['tests.helpers.toy'])
    cfg.env_cfg.dist_cfg = dict(backend='gloo', timeout=1800)
    toy.in_order(cfg)
    cfg.train_dataloader.batch_size = 1
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.custom_hooks = [dict(type='ToySaveRecord')]
    cfg.train_cfg.max_epochs = 1
    launch(tmp_path / 'two', cfg)
    first, second = records(tmp_path / 'two')
    # PAA divides by each process' own positives: one process computes the
    # two halves of the batch one after the other.
    one = copy.deepcopy(cfg)
    one.work_dir = str(tmp_path / 'one')
    one.optim_wrapper.accumulative_counts = 2
    toy.train(one)
    (expected,) = records(tmp_path / 'one')
    assert toy.same(first['weights'], second['weights'])
    for name, weight in expected['weights'].items():
        other = first['weights'][name]
        torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-5)
    a, b = first['losses'][0], second['losses'][0]
    halves = expected['losses'][:2]
    for key in a:
        if key != 'grad_norm' and not key.startswith('co.'):
            got = (a[key] + b[key]) / 2
            mean = (halves[0][key] + halves[1][key]) / 2
            assert got == pytest.approx(mean, rel=1e-3), key


class TestBadPeers:
    def test_a_peer_that_diverges_is_named(self, tmp_path):
        """The checkpoints of both stay as they were."""

        class Diverge(Hook):
            def before_train_epoch(self, runner):
                if runner.epoch == 1:
                    model = runner.distiller.peers.big.model
                    torch.nn.init.constant_(model.backbone.conv1.weight, 1e38)

        with pytest.raises(NonFiniteLossError, match=r'big\.loss'):
            toy.train(config(tmp_path, epochs=2), Diverge())
        for folder in ('', 'big'):
            checkpoint = toy.load(tmp_path / folder / 'epoch_1.pth')
            weights = checkpoint['state_dict'].values()
            assert all(w.isfinite().all() for w in weights)
            assert not (tmp_path / folder / 'epoch_2.pth').exists()

    def test_without_config(self, tmp_path):
        with pytest.raises(ConfigError, match=r'peers\.big needs a "config"'):
            toy.train(config(tmp_path, peer=dict(checkpoint=None)))

    def test_an_unknown_option(self, tmp_path):
        cfg = config(tmp_path)
        cfg.distillation.peers.big.chekpoint = 'x.pth'
        with pytest.raises(ConfigError, match='Did you mean "checkpoint"'):
            toy.train(cfg)

    def test_the_name_of_a_method(self, tmp_path):
        cfg = config(tmp_path)
        cfg.distillation.peers.co = cfg.distillation.peers.pop('big')
        with pytest.raises(ConfigError, match='"co" is also the name of a'):
            toy.train(cfg)

    def test_other_classes(self, tmp_path):
        cfg = config(tmp_path)
        cfg.distillation.peers.big.config.model.bbox_head.num_classes = 7
        with pytest.raises(ConfigError, match=r'classes: expected .* got 7'):
            toy.train(cfg)

    def test_another_kind_of_optimiser(self, tmp_path):
        cfg = config(tmp_path)
        cfg.distillation.peers.big.optim_wrapper = dict(
            type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3)
        )
        message = r'peers\.big\.optim_wrapper: the optimiser is AdamW'
        with pytest.raises(ConfigError, match=message):
            toy.train(cfg)

    def test_another_kind_of_optimiser_of_a_trained_teacher(self, tmp_path):
        cfg = config(tmp_path)
        peers = cfg.distillation.pop('peers')
        cfg.distillation.teacher = dict(
            config=peers.big.config,
            trainable=True,
            optim_wrapper=dict(
                type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3)
            ),
        )
        cfg.distillation.methods = dict(
            several=dict(type='mmkd.OneTeacherSeveralStudents', beta=0.0)
        )
        message = r'distillation\.teacher\.optim_wrapper: the optimiser is'
        with pytest.raises(ConfigError, match=message):
            toy.train(cfg)

    def test_an_optimiser_built_without_the_peers(self, tmp_path):
        cfg = config(tmp_path)
        model = toy.detector(cfg.model)
        runner = toy.build(cfg)
        runner.optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        with pytest.raises(ConfigError, match=r'not train .*peers\.big'):
            runner.train()


def test_a_peer_is_clipped_in_its_own_way(tmp_path):
    """By value, beside a student that is clipped by its norm."""
    cfg = config(tmp_path, base=toy.RETINANET, methods={}, images=4)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    own = copy.deepcopy(cfg.optim_wrapper.to_dict())
    own['clip_grad'] = dict(type='value', clip_value=1e-4)
    cfg.distillation.peers.big.optim_wrapper = own
    largest = []

    class Largest(Hook):
        def before_train(self, runner):
            optimizer = runner.optim_wrapper.optimizer
            optimizer.register_step_pre_hook(lambda *_: self.note(runner))

        def note(self, runner):
            grads = [
                p.grad.abs().max().item()
                for p in runner.distiller.peers.big.parameters()
                if p.grad is not None
            ]
            largest.append(max(grads))

    toy.train(cfg, Largest())
    assert largest == pytest.approx([1e-4] * len(largest))


def test_a_methods_layers_are_clipped_by_themselves(tmp_path):
    """However large their gradient, the networks' steps stay as they are."""
    norms = []

    class Norms(Hook):
        def before_train(self, runner):
            optimizer = runner.optim_wrapper.optimizer
            optimizer.register_step_pre_hook(lambda *_: self.note(runner))

        def note(self, runner):
            distiller = runner.distiller
            own = [
                p
                for name, p in runner.model.named_parameters()
                if not name.startswith('distillation')
            ]
            for part in (own, list(distiller.methods.parameters())):
                grads = [p.grad.flatten() for p in part if p.grad is not None]
                norms.append(torch.cat(grads).norm().item())

    dcm = dict(type='mmkd.DCM', kl_weight=0, loss_weight=1000)
    cfg = config(tmp_path, base=toy.RETINANET, methods=dict(dcm=dcm), images=4)
    cfg.optim_wrapper.clip_grad = dict(max_norm=0.1)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    toy.train(cfg, Norms())
    assert norms == pytest.approx([0.1] * len(norms), rel=1e-3)
