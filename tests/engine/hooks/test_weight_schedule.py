"""Schedules of the methods' weights."""

import copy
import math

import pytest
from mmengine.hooks import Hook

from mmkd.engine.hooks import WeightScheduleHook
from mmkd.errors import ConfigError
from tests.helpers import toy


class TestFactor:
    """Hand-worked values, for a training that ends at 100."""

    @pytest.mark.parametrize(
        ('options', 'expected'),
        [
            (dict(), {0: 1, 50: 1, 100: 1}),
            (dict(warmup=10), {0: 0, 1: 0.1, 5: 0.5, 10: 1, 99: 1}),
            (dict(decay='linear'), {0: 1, 25: 0.75, 50: 0.5, 100: 0}),
            (
                dict(decay='cosine'),
                {0: 1, 50: 0.5, 100: 0, 25: (1 + math.sqrt(0.5)) / 2},
            ),
            (
                dict(warmup=20, decay='linear'),  # p = (t - 20) / 80
                {0: 0, 10: 0.5, 20: 1, 40: 0.75, 60: 0.5, 100: 0},
            ),
            (dict(stop_at=30), {0: 1, 29.9: 1, 30: 0, 100: 0}),
            (
                dict(warmup=10, decay='linear', stop_at=30),
                {5: 0.5, 10: 1, 20: 0.5, 29: 0.05, 30: 0, 31: 0},
            ),
            (dict(warmup=10, stop_at=10), {5: 0.5, 10: 0}),
            (dict(warmup=200, decay='linear'), {50: 0.25, 100: 0.5}),
            (dict(stop_at=0), {0: 0, 1: 0}),
        ],
    )
    def test_values(self, options, expected):
        hook = WeightScheduleHook(**options)
        for time, factor in expected.items():
            assert hook.factor(time, 100) == pytest.approx(factor), time

    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            (dict(decay='cosin'), r"'cosin'.*Did you mean \"cosine\""),
            (dict(warmup=-1), 'at least 0, got -1'),
            (dict(warmup=9, stop_at=5), r'stop_at \(5\).*warm-up \(9\)'),
            (dict(every=0), 'whole number of at least 1, got 0'),
            (dict(every=1.5), 'whole number of at least 1, got 1.5'),
        ],
    )
    def test_wrong_options(self, options, message):
        with pytest.raises(ConfigError, match=message):
            WeightScheduleHook(**options)


class Watch(Hook):
    """The methods' factors, and how often the teacher's backbone has run."""

    priority = 'LOWEST'
    not_resumed = ('factors', 'runs')

    def before_train(self, runner):
        self.factors, self.runs = [], []
        self.weights = []
        backbone = runner.distiller.teacher.model.backbone
        backbone.register_forward_hook(self.ran)

    def ran(self, *_):
        self.runs[-1] += 1

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.factors.append(dict(runner.distiller.scales))
        self.runs.append(0)


def run(tmp_path, *schedules, epochs=2, **changes):
    cfg = toy.distilled(
        tmp_path,
        methods={'hint': toy.HINT, 'kd': toy.FRCNN},
        epochs=epochs,
        images=6,
    )
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.custom_hooks = [
        dict(type='mmkd.WeightScheduleHook', **s) for s in schedules
    ]
    for key, value in changes.items():
        cfg[key] = value
    watch, record = Watch(), toy.Record()
    toy.train(copy.deepcopy(cfg), watch, record)
    return cfg, watch, record


class TestRun:
    """Two epochs of three iterations."""

    def test_iterations(self, tmp_path):
        _, watch, record = run(
            tmp_path,
            dict(methods='hint', warmup=2),
            dict(methods=['kd'], decay='linear', stop_at=4),
        )
        hint = [f['hint'] for f in watch.factors]
        assert hint == [0, 0.5, 1, 1, 1, 1]
        kd = [f['kd'] for f in watch.factors]
        assert kd == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0])
        for losses, one, other in zip(record.losses, hint, kd, strict=True):
            assert ('hint.loss_hint' in losses) == (one > 0)
            assert ('kd.loss_rcn_soft' in losses) == (other > 0)

    def test_the_factor_scales_the_loss_and_the_task_share(self, tmp_path):
        _, _, full = run(tmp_path / 'a', epochs=1)
        # p = 1/2 of the way at the first iteration of this warm-up
        hook = dict(methods='kd', warmup=2)
        _, watch, half = run(tmp_path / 'b', hook, epochs=1, load_from=None)
        assert watch.factors[0]['kd'] == 0
        assert 'kd.loss_rcn_soft' not in half.losses[0]
        # loss_cls = mu * hard with mu = 0.5 at full weight, hard at none
        assert full.losses[0]['loss_cls'] == pytest.approx(
            0.5 * half.losses[0]['loss_cls']
        )

    def test_epochs_with_their_fraction(self, tmp_path):
        _, watch, _ = run(
            tmp_path, dict(warmup=1, decay='linear', by_epoch=True)
        )
        # warm-up in epoch 1 (t = 0, 1/3, 2/3), decay over epoch 2
        assert [f['hint'] for f in watch.factors] == pytest.approx(
            [0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]
        )

    def test_epochs_of_an_iteration_based_run(self, tmp_path):
        cfg = toy.distilled(tmp_path)
        train = dict(type='IterBasedTrainLoop', max_iters=6)
        loader = cfg.train_dataloader
        loader.sampler.type = 'InfiniteSampler'
        loader.pop('batch_sampler')
        loader.dataset.indices = 6
        _, watch, _ = run(
            tmp_path,
            dict(decay='linear', by_epoch=True),
            train_cfg=train,
            train_dataloader=loader,
        )
        assert [f['hint'] for f in watch.factors] == pytest.approx(
            [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
        )

    def test_the_teacher_rests_when_all_are_off(self, tmp_path):
        _, watch, record = run(tmp_path, dict(stop_at=2))
        assert watch.runs == [1, 1, 0, 0, 0, 0]
        stock = ('loss', 'grad_norm', 'acc')
        for losses in record.losses[2:]:
            assert not any('.' in name for name in losses)
            assert losses['loss'] == pytest.approx(
                sum(v for k, v in losses.items() if k not in stock)
            )

    def test_a_resumed_run_goes_on(self, tmp_path):
        cfg, watch, record = run(tmp_path, dict(decay='cosine'))
        cfg.load_from, cfg.resume = str(tmp_path / 'epoch_1.pth'), True
        again, other = Watch(), toy.Record()
        toy.train(cfg, again, other)
        assert again.factors == watch.factors[3:]
        assert other.losses == record.losses[3:]

    def test_every_other_iteration(self, tmp_path):
        schedule = dict(every=2, decay='linear')
        cfg, watch, record = run(tmp_path / 'a', schedule)
        hint = [f['hint'] for f in watch.factors]
        # 2 * (1 - t / 6) in the iterations 0, 2 and 4
        assert hint == pytest.approx([2, 0, 4 / 3, 0, 2 / 3, 0])
        assert watch.runs == [1, 0, 1, 0, 1, 0]
        # In between as without methods: those of this run have stopped.
        _, _, stopped = run(tmp_path / 'b', dict(every=2, stop_at=1), epochs=1)
        assert not any('.' in name for name in record.losses[1])
        assert record.losses[:2] == stopped.losses[:2]
        cfg.load_from = str(tmp_path / 'a' / 'epoch_1.pth')
        cfg.resume = True
        again, other = Watch(), toy.Record()
        toy.train(cfg, again, other)
        assert again.factors == watch.factors[3:]
        assert other.losses == record.losses[3:]

    def test_the_loss_has_as_many_times_the_weight(self, tmp_path):
        _, _, once = run(tmp_path / 'a', epochs=1)
        _, _, twice = run(tmp_path / 'b', dict(every=3), epochs=1)
        names = [name for name in once.losses[0] if '.loss' in name]
        assert len(names) >= 4
        for name in names:
            assert twice.losses[0][name] == pytest.approx(
                3 * once.losses[0][name]
            )

    def test_an_unknown_method(self, tmp_path):
        with pytest.raises(
            ConfigError, match=r'no method "hnt".*Did you mean "hint"'
        ):
            run(tmp_path, dict(methods=['hnt']))

    def test_without_distillation(self, tmp_path):
        with pytest.raises(ConfigError, match='a run that distils'):
            run(tmp_path, dict(warmup=1), distillation=None)
