"""Losses that are not finite, or always 0."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict

from mmkd.engine.hooks import LossCheckHook
from mmkd.errors import ConfigError, NonFiniteLossError
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
