"""What would be ignored is refused, or said once."""

import pytest
from mmengine.config import ConfigDict
from mmengine.hooks import CheckpointHook
from mmengine.runner import LogProcessor

from mmkd.engine.config_checks import check_keys, remarks
from mmkd.engine.hooks import SafeCheckpointHook
from mmkd.engine.log_processor import TrainingLog
from mmkd.errors import ConfigError
from tests.helpers import toy

FSDP = dict(type='FSDPStrategy', model_wrapper=dict(auto_wrap_policy=None))


class TestStrategy:
    @pytest.mark.parametrize(
        'strategy',
        [FSDP, dict(type='DeepSpeedStrategy'), 'SingleDeviceStrategy'],
    )
    def test_the_runner_refuses_it(self, tmp_path, strategy):
        cfg = toy.distilled(tmp_path, toy.RETINANET)
        cfg.strategy = strategy
        with pytest.raises(ConfigError, match=r'`strategy`.*FlexibleRunner'):
            toy.build(cfg)

    def test_none_is_none(self):
        check_keys(dict(strategy=None, distillation=None))


def said(cfg, hooks=None, log=None):
    hooks = [SafeCheckpointHook()] if hooks is None else hooks
    return remarks(ConfigDict(cfg), hooks, log or TrainingLog())


class TestKeys:
    @pytest.mark.parametrize(
        ('key', 'meant'),
        [
            ('param_schedulers', 'param_scheduler'),
            ('custom_hook', 'custom_hooks'),
            ('default_hook', 'default_hooks'),
            ('autoscale_lr', 'auto_scale_lr'),
            ('load_form', 'load_from'),
            ('randomnes', 'randomness'),
            ('lr_config', 'param_scheduler'),
            ('checkpoint_config', r'default_hooks\.checkpoint'),
        ],
    )
    def test_a_key_that_nothing_reads(self, key, meant):
        (text,) = said({key: 1, 'param_scheduler': []})
        assert f'the key `{key}`' in text
        assert text.endswith(f'did you mean {meant}?'.replace('\\', ''))

    def test_variables_of_stock_configs(self):
        yolox = 'yolox/yolox_s_8xb8-300e_coco.py'
        for base in (toy.FASTER_RCNN, toy.PAA, yolox):
            assert not said(toy.stock(base).to_dict())
        names = 'val_evaluator_abs test_pipeline base_lr max_epochs conv_cfg'
        assert not said(dict.fromkeys(names.split(), 1))


class TestHooks:
    class Mine(CheckpointHook):
        pass

    class MineToo(SafeCheckpointHook):
        pass

    def test_checkpoints_that_are_not_saved_safely(self):
        (text,) = said({}, [self.Mine()])
        assert text.startswith('Mine saves the checkpoints')
        assert 'mmkd.SafeCheckpointHook' in text
        assert not said({}, [self.MineToo()])

    def test_no_checkpoints(self, tmp_path):
        cfg = toy.distilled(tmp_path, toy.RETINANET, images=2)
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
        cfg.default_hooks.checkpoint = None
        toy.train(cfg)
        (log,) = tmp_path.glob('*/*.log')
        assert log.read_text().count('saves no checkpoints') == 1
        assert not list(tmp_path.glob('*.pth'))


class TestLog:
    class Mine(LogProcessor):
        pass

    def test_one_s_own_is_kept_and_said(self, tmp_path):
        cfg = toy.distilled(tmp_path, toy.RETINANET)
        cfg.log_processor = dict(type=self.Mine, window_size=7)
        log = toy.build(cfg).log_processor
        assert (type(log), log.window_size) == (self.Mine, 7)
        (text,) = said({}, log=log)
        assert text.startswith('Mine writes the log')

    @pytest.mark.parametrize(
        'kind', ['LogProcessor', 'mmengine.runner.LogProcessor', LogProcessor]
    )
    def test_ours_takes_the_place_of_the_stock_one(self, tmp_path, kind):
        cfg = toy.distilled(tmp_path, toy.RETINANET)
        cfg.log_processor = dict(type=kind, window_size=7)
        log = toy.build(cfg).log_processor
        assert (type(log), log.window_size) == (TrainingLog, 7)
