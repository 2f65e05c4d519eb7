"""Losses are judged by a few real steps, and put right by what is advised."""

import re
import statistics

import pytest
import torch

from mmkd.doctor import diagnose, examination
from tests.doctor.test_traps import config, examine_only
from tests.helpers import (
    faults,  # noqa: F401 registers them
)


def test_a_method_that_drowns_the_task(tmp_path, monkeypatch):
    """The weight that is advised makes its gradient as large as the task's."""
    examine_only(monkeypatch, 'check_balance')
    cfg = config(tmp_path, loss_weight=100)
    cfg.optim_wrapper.clip_grad.max_norm = 0.01  # below the task's gradient
    report = diagnose(cfg)
    (found,) = report.warns
    assert not report.stops
    assert 'kd.loss_cwd outweighs the task: its gradient is ' in found
    share = float(re.search(r'leaves 1/(\d+) of the task', found)[1])
    ratios = report.values['balance']['kd.loss_cwd']
    assert share == pytest.approx(statistics.median(ratios), rel=0.3)
    assert 'mmkd.GradientBalanceHook' in found
    assert 'steps of the optimiser' in report.sections['Balance'][0]

    weight = float(re.search(r'loss_weight=(\S+) \(now 100\)', found)[1])
    cfg.distillation.methods.kd.loss_weight = weight
    report = diagnose(cfg)
    assert not report.findings
    (ratios,) = report.values['balance'].values()
    assert 0.3 < statistics.median(ratios) < 3


def test_a_method_that_the_task_drowns(tmp_path, monkeypatch):
    examine_only(monkeypatch, 'check_balance')
    (found,) = diagnose(config(tmp_path, loss_weight=1e-6)).warns
    assert 'kd.loss_cwd hardly teaches' in found


def test_an_explosion_that_ends(tmp_path, monkeypatch):
    """At first the ratio is that of a finding that stops."""
    examine_only(monkeypatch, 'check_balance')
    cfg = config(tmp_path, 'ExplodesAtFirst')
    # So small a rate that the student survives these two steps.
    cfg.optim_wrapper.optimizer.lr = 1e-8
    report = diagnose(cfg)
    (ratios,) = report.values['balance'].values()
    assert ratios[0] > 1000 > ratios[-1]
    assert not report.stops


def test_all_is_put_back(tmp_path, monkeypatch):
    """Weights, buffers, learning rates, and nothing in the optimiser."""
    found = {}

    def before(patient):
        optimizer = patient.runner.optim_wrapper.optimizer
        found['rates'] = [group['lr'] for group in optimizer.param_groups]

    def after(patient):
        optimizer = patient.runner.optim_wrapper.optimizer
        assert found['rates'] == [g['lr'] for g in optimizer.param_groups]
        assert not optimizer.state
        assert all(p.grad is None for p in patient.student.parameters())
        state = patient.student.state_dict()
        assert all(
            torch.equal(state[name], value)
            for name, value in patient.state.items()
        )
        found['done'] = True

    examine_only(monkeypatch, 'check_balance')
    monkeypatch.setattr(examination, 'check_losses', before)
    monkeypatch.setattr(examination, 'check_cost', after)
    diagnose(config(tmp_path, loss_weight=100))
    assert found['done']
