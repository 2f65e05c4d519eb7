"""Losses that are not finite, or always 0."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict

from mmkd.engine.hooks import LossCheckHook, loss_check
from mmkd.errors import ConfigError, NonFiniteError, NonFiniteLossError
from tests.helpers import toy


class Break(Hook):
    """Puts a value into the teacher's first layer before an iteration."""

    def __init__(self, at, value=float('nan')):
        self.at, self.value = at, value

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            self.state = copy.deepcopy(runner.model.state_dict())
            weight = runner.distiller.teacher.model.backbone.conv1.weight
            weight.data.fill_(self.value)


def config(tmp_path, **changes):
    cfg = toy.distilled(
        tmp_path, methods={'a': toy.HINT, 'b': toy.FRCNN}, images=6
    )
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.update(changes)
    return cfg


def assert_not_stepped(runner, state):
    for name, value in runner.model.named_parameters():
        assert torch.equal(value, state[name]), name


class TestNotFinite:
    @pytest.mark.parametrize('value', [float('nan'), float('inf')])
    @pytest.mark.parametrize('at', [0, 2])
    def test_stops_before_the_step(self, tmp_path, at, value):
        runner, broken = toy.build(config(tmp_path)), Break(at, value)
        runner.register_hook(broken)
        with pytest.raises(
            NonFiniteLossError,
            match=r'a\.loss_hint, b\.loss.*loss_weight of "a"',
        ):
            runner.train()
        assert runner.iter == at
        assert_not_stepped(runner, broken.state)

    @pytest.mark.parametrize('wrapper', ['CpuAmpOptimWrapper', 'scaled'])
    def test_in_mixed_precision(self, tmp_path, wrapper):
        """A gradient scaler skips the step that would be stopped."""
        cfg = toy.distilled(
            tmp_path, toy.RETINANET, methods={'a': toy.HINT}, images=6
        )
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
        cfg.optim_wrapper.update(
            type='ToyCpuAmpOptimWrapper', scale=wrapper == 'scaled'
        )
        runner, broken = toy.build(cfg), Break(1)
        runner.register_hook(broken)
        with pytest.raises(NonFiniteLossError, match=r'a\.loss_hint'):
            runner.train()
        assert runner.iter == 1
        assert_not_stepped(runner, broken.state)

    @pytest.mark.gpu
    @pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
    def test_in_mixed_precision_on_a_gpu(self, tmp_path, dtype):
        """Of GFL: other heads' CUDA operators have no bfloat16."""
        cfg = toy.distilled(
            tmp_path,
            'gfl/gfl_r50_fpn_1x_coco.py',
            methods={'a': toy.HINT},
            images=6,
        )
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
        cfg.optim_wrapper.update(
            type='AmpOptimWrapper', dtype=dtype, loss_scale='dynamic'
        )
        runner, broken = toy.build(cfg), Break(1)
        runner.register_hook(broken)
        with pytest.raises(NonFiniteLossError, match=r'a\.loss_hint'):
            runner.train()
        assert_not_stepped(runner, broken.state)

    def test_with_accumulated_gradients(self, tmp_path):
        cfg = config(tmp_path)
        cfg.optim_wrapper.accumulative_counts = 3
        runner, broken = toy.build(cfg), Break(1)
        runner.register_hook(broken)
        with pytest.raises(NonFiniteLossError):
            runner.train()
        assert runner.iter == 1
        assert_not_stepped(runner, broken.state)

    def test_with_several_optimizers(self):
        model = torch.nn.Linear(2, 2)
        wrappers = {
            name: OptimWrapper(torch.optim.SGD([parameter], lr=0.1))
            for name, parameter in model.named_parameters()
        }
        hook = LossCheckHook()
        runner = SimpleNamespace(
            distiller=SimpleNamespace(observers=[]),
            optim_wrapper=OptimWrapperDict(**wrappers),
        )
        hook.before_train(runner)
        hook.observe({}, {'a': {'a.loss_x': torch.tensor(float('nan'))}})
        with pytest.raises(NonFiniteLossError, match=r'a\.loss_x'):
            wrappers['bias'].step()

    def test_a_finite_run_is_left_alone(self, tmp_path):
        records = []
        for name in ('a', 'b'):
            cfg = config(tmp_path / name)
            cfg.custom_hooks = [dict(type='mmkd.LossCheckHook', patience=1)]
            records.append(toy.Record())
            runner = toy.train(cfg, records[-1])
        hooks = [h for h in runner.hooks if isinstance(h, LossCheckHook)]
        assert len(hooks) == 1  # the configured one takes the place
        assert records[0].losses == records[1].losses


class Poison(Hook):
    """Multiplies a part of the student's own step from an iteration on."""

    def __init__(self, what, at=2, value=float('nan'), until=None):
        self.what, self.value = what, value
        self.at, self.until = at, at + 1 if until is None else until

    def before_train(self, runner):
        rpn = getattr(runner.model, 'rpn_head', None)
        conv = rpn.rpn_cls if rpn else runner.model.bbox_head.retina_cls
        if self.what == 'loss':
            conv.register_forward_hook(
                lambda m, i, out: out * self.factor if m.training else out
            )
        else:
            conv.weight.register_hook(lambda gradient: gradient * self.factor)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        now = self.at <= runner.iter < self.until
        self.factor = self.value if now else 1.0
        if runner.iter == self.at:
            self.state = copy.deepcopy(runner.model.state_dict())


def plain_config(tmp_path, clip=None, base=toy.FASTER_RCNN):
    cfg = toy.plain(tmp_path, base, images=8)
    cfg.runner_type = toy.RUNNER
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.optim_wrapper.clip_grad = clip
    return cfg


class TestTheStudentItself:
    """What the student computes, with distillation and without."""

    @pytest.mark.parametrize('plain', [True, False])
    def test_its_loss(self, tmp_path, plain):
        cfg = (plain_config if plain else config)(tmp_path)
        runner, poison = toy.build(cfg), Poison('loss')
        runner.register_hook(poison)
        with pytest.raises(
            NonFiniteLossError,
            match=r'^loss_rpn_cls(, loss_rpn_bbox)? is NaN or infinite; '
            r'training stopped before the optimiser used it\. This run has '
            r'saved no checkpoint .* Lower the learning rate',
        ):
            runner.train()
        assert runner.iter == 2
        assert_not_stepped(runner, poison.state)
        assert not runner.model._forward_hooks  # nothing is left behind

    CLIPS = (None, dict(max_norm=5.0), dict(type='value', clip_value=1.0))

    @pytest.mark.parametrize('clip', CLIPS)
    @pytest.mark.parametrize('accumulated', [1, 2])
    def test_its_gradient(self, tmp_path, clip, accumulated):
        """The average of the weights (EMA) does not get it, either."""
        cfg = plain_config(tmp_path, clip)
        cfg.optim_wrapper.accumulative_counts = accumulated
        cfg.custom_hooks = [dict(type='EMAHook')]
        runner, poison = toy.build(cfg), Poison('gradient')
        runner.register_hook(poison)
        named = 'weights? is|rpn_cls.weight is'
        if clip and 'max_norm' in clip:
            named = r'.* and \d+ more is'  # clipping has spread it
        with pytest.raises(
            NonFiniteError, match=f'^the gradient of .*({named}) NaN'
        ) as caught:
            runner.train()
        assert 'before the optimiser used it' in str(caught.value)
        assert 'in memory' not in str(caught.value)
        assert not isinstance(caught.value, NonFiniteLossError)
        assert runner.iter == 1 + accumulated
        assert_not_stepped(runner, poison.state)
        averages = [h for h in runner.hooks if hasattr(h, 'ema_model')]
        for value in averages[0].ema_model.parameters():
            assert value.isfinite().all()

    def test_an_infinite_gradient_that_is_clipped_is_used(self, tmp_path):
        cfg = plain_config(tmp_path, dict(type='value', clip_value=1.0))
        poison = Poison('gradient', value=-1e39)  # -inf in float32
        runner = toy.train(cfg, poison)
        assert runner.iter == 4

    def test_weights_that_were_broken_before_are_named(self, tmp_path):
        class Break(Hook):
            def before_train_epoch(self, runner):
                if runner.epoch == 1:
                    runner.model.rpn_head.rpn_cls.bias.data.fill_(torch.nan)

        cfg = plain_config(tmp_path, dict(max_norm=5.0))
        cfg.train_cfg.max_epochs = 2
        with pytest.raises(
            NonFiniteLossError,
            match=r'Not finite in memory are also rpn_head\.rpn_cls\.bias\. '
            r'The last checkpoint, \S+/epoch_1\.pth, held only finite .*'
            r'--resume \S+/epoch_1\.pth ',
        ):
            toy.train(cfg, Break())

    def test_with_several_optimizers(self):
        """The gradient of the second one; the first has taken its step."""
        model = torch.nn.Linear(2, 2)
        wrappers = {
            name: OptimWrapper(torch.optim.SGD([parameter], lr=0.1))
            for name, parameter in model.named_parameters()
        }
        runner = SimpleNamespace(
            model=model, optim_wrapper=OptimWrapperDict(**wrappers)
        )
        hook = LossCheckHook()
        hook.before_train(runner)
        model.weight.grad = torch.ones(2, 2)
        model.bias.grad = torch.tensor([0.0, torch.nan])
        before = copy.deepcopy(model.bias)
        wrappers['weight'].step()
        with pytest.raises(NonFiniteError, match='the gradient of bias is'):
            wrappers['bias'].step()
        assert torch.equal(model.bias, before)

    @pytest.mark.parametrize(
        ('losses', 'broken'),
        [
            ({'loss_a': [torch.ones(1), torch.tensor(torch.nan)]}, 'loss_a'),
            ({'loss_a': {'x': {'y': torch.tensor(torch.inf)}}}, 'loss_a'),
            ({'loss_a': [torch.zeros(0)]}, 'loss_a'),  # its mean is NaN
            ({'loss_a': torch.ones(3), 'acc': torch.tensor(torch.nan)}, ''),
            ({'loss_a': []}, ''),
        ],
    )
    def test_what_counts_as_a_loss(self, losses, broken):
        hook = LossCheckHook()
        hook.observe(losses, {})
        if broken:
            with pytest.raises(NonFiniteLossError, match=f'^{broken} is NaN'):
                hook.after_train_iter(None)
        else:
            hook.after_train_iter(None)

    @pytest.mark.parametrize('what', ['loss', 'gradient'])
    def test_what_is_read_late(self, tmp_path, monkeypatch, what):
        """As on a GPU: a loss is known before the step, a gradient is not."""
        monkeypatch.setattr(loss_check, 'is_host', lambda device: False)
        cfg = plain_config(tmp_path)
        runner, poison = toy.build(cfg), Poison(what)
        runner.register_hook(poison)
        with pytest.raises(NonFiniteError) as caught:
            runner.train()
        assert runner.iter == 2
        text = str(caught.value)
        if what == 'loss':
            assert 'stopped before the optimiser used it' in text
            assert_not_stepped(runner, poison.state)
        else:
            assert 'stopped after the optimiser had used it' in text
            assert 'Not finite in memory are also rpn_head.rpn_cls.w' in text


class TestAGradientScaler:
    """It skips steps with infinite gradients, which is no error."""

    def config(self, tmp_path, **optimizer):
        cfg = plain_config(tmp_path, base=toy.RETINANET)
        cfg.optim_wrapper = dict(
            type='ToyCpuAmpOptimWrapper',
            scale=True,
            optimizer=dict(type='SGD', lr=0.001) | optimizer,
        )
        return cfg

    FUSED = dict(type='Adam', fused=True)

    @pytest.mark.parametrize('optimizer', [{}, FUSED])
    def test_some_skipped_steps(self, tmp_path, optimizer):
        cfg = self.config(tmp_path, **optimizer)
        poison = Poison('gradient', 1, torch.inf, until=3)
        runner = toy.train(cfg, poison)
        assert runner.iter == 4
        assert runner.optim_wrapper.scaler.get_scale() == 2.0**14
        assert toy.load(tmp_path / 'epoch_1.pth')['meta']['iter'] == 4

    @pytest.mark.parametrize('optimizer', [{}, FUSED])
    def test_too_many(self, tmp_path, monkeypatch, optimizer):
        monkeypatch.setattr(loss_check, 'SKIPPED', 3)
        cfg = self.config(tmp_path, **optimizer)
        runner, poison = toy.build(cfg), Poison('gradient', 1, until=9)
        runner.register_hook(poison)
        with pytest.raises(
            NonFiniteError, match=r'in 3 optimiser steps .* fallen to 8192'
        ):
            runner.train()
        assert runner.iter == 3
        assert_not_stepped(runner, poison.state)

    def test_a_loss_is_an_error_nevertheless(self, tmp_path):
        runner, poison = toy.build(self.config(tmp_path)), Poison('loss', 1)
        runner.register_hook(poison)
        with pytest.raises(NonFiniteLossError, match='before the optimiser'):
            runner.train()
        assert runner.iter == 1


class TestAlwaysZero:
    def warnings(self, tmp_path, caplog, patience, methods):
        cfg = config(tmp_path)
        cfg.distillation.methods = methods
        cfg.custom_hooks = [dict(type='mmkd.LossCheckHook', patience=patience)]
        runner = toy.build(cfg)
        runner.logger.addHandler(caplog.handler)
        runner.train()
        return [
            r.getMessage()
            for r in caplog.records
            if r.levelno >= logging.WARNING and 'exactly 0' in r.getMessage()
        ]

    ZERO = dict(toy.HINT, loss=dict(type='mmkd.HintLoss', loss_weight=0.0))

    def test_once_after_patience(self, tmp_path, caplog):
        texts = self.warnings(
            tmp_path, caplog, 2, {'zero': self.ZERO, 'one': toy.HINT}
        )
        assert len(texts) == 1
        assert texts[0].startswith('zero.loss_hint was exactly 0')
        assert 'first 2 iterations' in texts[0]

    def test_not_before(self, tmp_path, caplog):
        assert not self.warnings(tmp_path, caplog, 4, {'zero': self.ZERO})

    def test_patience(self):
        with pytest.raises(ConfigError, match='at least 1, got 0'):
            LossCheckHook(patience=0)
