"""Gradients of the methods beside the task's."""

import copy
import json
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook

from mmkd.engine.hooks import TelemetryHook
from mmkd.errors import ConfigError
from tests.helpers import toy


class Independent(Hook):
    """The gradients, by a backward pass of its own for each method."""

    def before_train(self, runner):
        self.expected = []
        student = runner.distiller.student
        self.parameters = [
            parameter
            for name, parameter in student.named_parameters()
            if 'distillation' not in name
        ]
        runner.distiller.observers.append(self.observe)

    def gradient(self, losses):
        total = sum(
            part.sum()
            for loss in losses
            for part in (loss if isinstance(loss, list) else [loss])
        )
        parts = torch.autograd.grad(
            total, self.parameters, retain_graph=True, materialize_grads=True
        )
        return torch.cat([part.flatten() for part in parts]).double()

    def observe(self, task, distilled):
        task = self.gradient([v for k, v in task.items() if 'loss' in k])
        values, self.total = {'task/grad_norm': task.norm().item()}, task
        for name, losses in distilled.items():
            own = self.gradient(losses.values())
            self.total = self.total + own
            values[f'{name}/loss'] = sum(losses.values()).item()
            values[f'{name}/grad_norm'] = own.norm().item()
            values[f'{name}/cosine'] = (
                own @ task / (own.norm() * task.norm())
            ).item()
        self.expected.append(values)


def run(tmp_path, *hooks, interval=2, backbone=None, **options):
    cfg = toy.distilled(
        tmp_path, methods={'hint': toy.HINT, 'kd': toy.FRCNN}, **options
    )
    cfg.model.backbone.update(backbone or {})
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.optim_wrapper.clip_grad = None
    if interval:
        cfg.custom_hooks = [dict(type='mmkd.TelemetryHook', interval=interval)]
    record = toy.Record()
    runner = toy.train(cfg, record, *hooks)
    return runner, record


def scalars(runner):
    """What the local visualiser has written, by iteration."""
    (path,) = Path(runner.work_dir).rglob('scalars.json')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        line['step']: {
            k.removeprefix('distillation/'): v
            for k, v in line.items()
            if k.startswith('distillation/')
        }
        for line in lines
        if 'distillation/task/grad_norm' in line
    }


def test_against_an_independent_backward_pass(tmp_path):
    independent = Independent()
    runner, record = run(tmp_path, independent)
    found = scalars(runner)
    assert list(found) == [2, 4]  # the iterations that are measured
    for step, values in found.items():
        expected = independent.expected[step - 1]
        assert values.keys() == expected.keys()
        for key, value in expected.items():
            assert values[key] == pytest.approx(value, rel=1e-3), key
        assert -1 <= values['kd/cosine'] <= 1
        assert values['hint/grad_norm'] > 0
    # and they are the gradients that the optimiser gets
    applied = torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for (_, p), g in zip(
                record.named, record.gradients[-1], strict=True
            )
        ]
    )
    assert torch.allclose(
        applied.double(), independent.total, rtol=1e-3, atol=1e-5
    )


CHECKPOINTED = dict(with_cp=True, norm_eval=False, frozen_stages=0)


def test_checkpointed_blocks(tmp_path):
    """The gradients are those of the same network without checkpoints.

    Within reentrant checkpoints, ``torch.autograd.grad`` fails.
    """
    found = []
    for with_cp in (True, False):
        # Norms that do not count how often a block has run.
        backbone = dict(with_cp=with_cp, norm_eval=True, frozen_stages=0)
        folder = tmp_path / str(with_cp)
        found.append(scalars(run(folder, backbone=backbone)[0]))
    ours, expected = found
    assert list(ours) == list(expected) == [2, 4]
    for step, values in expected.items():
        assert ours[step] == pytest.approx(values, rel=1e-3)
        assert values['hint/grad_norm'] > 0


@pytest.mark.parametrize('backbone', [{}, CHECKPOINTED], ids=['', 'with_cp'])
def test_training_is_not_changed(tmp_path, backbone):
    with_it, record = run(tmp_path / 'a', interval=1, backbone=backbone)
    without, other = run(tmp_path / 'b', interval=None, backbone=backbone)
    assert record.losses == other.losses
    assert toy.same(record.gradients, other.gradients)
    assert toy.same(with_it.model.state_dict(), without.model.state_dict())


def test_a_method_that_is_off_is_left_out(tmp_path):
    cfg = toy.distilled(
        tmp_path,
        methods={'off': dict(toy.HINT, loss_weight=0.0), 'on': toy.HINT},
        images=2,
    )
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.custom_hooks = [dict(type='mmkd.TelemetryHook', interval=1)]
    found = scalars(toy.train(cfg))
    assert set(found[1]) == {
        'task/grad_norm',
        'on/loss',
        'on/grad_norm',
        'on/cosine',
    }


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip(
        'tensorboard.backend.event_processing.event_accumulator'
    )
    cfg = toy.distilled(tmp_path, images=2)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.visualizer.vis_backends = [dict(type='TensorboardVisBackend')]
    cfg.custom_hooks = [dict(type='mmkd.TelemetryHook', interval=1)]
    toy.train(copy.deepcopy(cfg))
    (path,) = tmp_path.rglob('events.out.*')
    events = accumulator.EventAccumulator(str(path))
    events.Reload()
    assert 'distillation/hint/cosine' in events.Tags()['scalars']


def test_interval():
    with pytest.raises(ConfigError, match='at least 1, got 0'):
        TelemetryHook(interval=0)
