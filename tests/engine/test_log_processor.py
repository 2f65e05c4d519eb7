"""What the lines of the log say, and when."""

import json
import re
from types import SimpleNamespace

import pytest
from mmengine.logging import MessageHub
from mmengine.runner import LogProcessor

from mmkd.engine.log_processor import TrainingLog
from tests.helpers import toy


def fake_runner(request, **scalars):
    """A runner at its third iteration, with what was logged in each."""
    hub = MessageHub.get_instance(request.node.name)
    runner = SimpleNamespace(
        message_hub=hub,
        train_loop=SimpleNamespace(dataloader=range(10)),
        train_dataloader=range(10),
        _train_loop={},
        epoch=0,
        iter=2,
    )
    update(runner, **scalars)
    return runner


def update(runner, **scalars):
    for name, value in scalars.items():
        runner.message_hub.update_scalar(f'train/{name}', value)


STOCK = {'lr': 0.01, 'base_lr': 0.02, 'generator.lr': 0.03}
LOSSES = {'loss_clr': 5.0, 'loss': 7.0, 'ld.loss_vlr': 0.25, 'cka.mlr': 0.5}


class TestNames:
    @pytest.mark.parametrize('hierarchy', [False, True])
    def test_only_learning_rates_are_printed_as_such(self, request, hierarchy):
        runner = fake_runner(request, **STOCK, **LOSSES)
        log = TrainingLog(log_with_hierarchy=hierarchy)
        tag, line = log.get_log_after_iter(runner, 2, 'train')
        rates, losses = re.fullmatch(
            r'Epoch\(train\) *\[1\]\[ 3/10\]  (.*?)  +(loss.*)', line
        ).groups()
        assert rates == (
            'lr: 1.0000e-02 base_lr: 2.0000e-02 generator.lr: 3.0000e-02'
        )
        assert sorted(losses.split('  ')) == [
            'cka.mlr: 0.5000',
            'ld.loss_vlr: 0.2500',
            'loss: 7.0000',
            'loss_clr: 5.0000',
        ]
        prefix = 'train/' if hierarchy else ''
        named = {prefix + name: v for name, v in {**STOCK, **LOSSES}.items()}
        assert {k: tag[k] for k in named} == named

    def test_the_stock_log_prints_them_among_the_rates(self, request):
        """This is what the class is for."""
        runner = fake_runner(request, **STOCK, **LOSSES)
        _, line = LogProcessor().get_log_after_iter(runner, 2, 'train')
        assert 'ld.loss_vlr: 2.5000e-01' in line

    def test_all_else_is_as_mmengine_prints_it(self, request):
        runner = fake_runner(
            request, **STOCK, loss=1.0, loss_cls=1.0, time=2.0, data_time=1.0
        )
        update(runner, loss_cls=2.0, grad_norm=3.0)
        options = dict(
            window_size=2,
            custom_cfg=[
                dict(
                    data_src='loss_cls',
                    log_name='loss_cls_max',
                    method_name='max',
                    window_size='epoch',
                )
            ],
        )
        ours = TrainingLog(**options).get_log_after_iter(runner, 2, 'train')
        stock = LogProcessor(**options).get_log_after_iter(runner, 2, 'train')
        assert ours == stock
        assert ours[0]['loss_cls'] == 1.5
        assert ours[0]['loss_cls_max'] == 2.0


class TestTimes:
    def test_a_line_has_what_was_computed_since_the_one_before(self, request):
        runner, log = fake_runner(request), TrainingLog(window_size=10)

        def line(*steps):
            for step in steps:
                update(runner, lr=0.1, grad_norm=1.0, **step)
            tag, text = log.get_log_after_iter(runner, 2, 'train')
            assert ('hint.loss' in text) == ('hint.loss' in tag)
            return {k: v for k, v in tag.items() if '.' in k or 'loss' in k}

        both = {'loss': 1.0, 'hint.loss': 4.0, 'hint.hits': 3.0}
        stock = {'loss': 1.0}
        assert line(both) == both
        # In one of the two steps: its mean is over those in which it was.
        assert line({**both, 'hint.loss': 2.0}, stock) == {
            **both,
            'hint.loss': 3.0,
        }
        assert line(stock) == stock
        assert line(stock, stock) == stock
        assert line(both)['hint.loss'] == pytest.approx(10 / 3)

    def test_other_numbers_stay(self, request):
        """Hooks may log theirs more seldom than lines are written."""
        runner, log = fake_runner(request, seldom=3.0), TrainingLog()
        for _ in range(2):
            update(runner, loss=1.0)
            tag, _ = log.get_log_after_iter(runner, 2, 'train')
            assert tag['seldom'] == 3.0


def rows(folder):
    (path,) = sorted(folder.glob('*/vis_data/scalars.json'))[-1:]
    found = map(json.loads, path.read_text().splitlines())
    return {row['step']: row for row in found if 'loss' in row}


def test_a_stopped_method_is_silent_also_after_resuming(tmp_path):
    """Two epochs of three iterations; the method has the first two."""
    cfg = toy.distilled(tmp_path, toy.RETINANET, epochs=2, images=6)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.custom_hooks = [dict(type='mmkd.WeightScheduleHook', stop_at=2)]
    toy.train(cfg)
    first = rows(tmp_path)
    spoken = {step: 'hint.loss_hint' in row for step, row in first.items()}
    assert spoken == {n: n <= 2 for n in range(1, 7)}
    cfg.load_from, cfg.resume = str(tmp_path / 'epoch_1.pth'), True
    toy.train(cfg)
    again = rows(tmp_path)
    assert again.keys() == {4, 5, 6}
    for step, row in again.items():
        assert not any('hint' in name for name in row)
        assert row['loss'] == first[step]['loss']
