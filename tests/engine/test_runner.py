"""The runner, and what the command line says about bad input."""

import re
import shutil

import pytest
import torch
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from mmkd.engine.runner import DistillationRunner
from mmkd.errors import CheckpointError
from tests.helpers import toy


class TestWithoutDistillation:
    @pytest.mark.usefixtures('photos')
    def test_it_is_mmengine_s_runner(self, tmp_path):
        cfg = toy.plain(tmp_path / 'stock')
        expected = toy.Record()
        stock = toy.train(cfg, expected)
        assert type(stock) is Runner
        cfg.runner_type, cfg.work_dir = toy.RUNNER, str(tmp_path / 'ours')
        record = toy.Record()
        ours = toy.train(cfg, record)
        assert type(ours) is DistillationRunner
        assert ours.distiller is None
        assert record.losses == expected.losses
        assert toy.same(record.metrics, expected.metrics)
        assert toy.same(ours.model.state_dict(), stock.model.state_dict())

    def test_a_runner_without_training(self, tmp_path):
        cfg = toy.distilled(tmp_path)
        cfg.train_dataloader = cfg.train_cfg = cfg.optim_wrapper = None
        cfg.param_scheduler = None
        runner = toy.build(cfg)
        with pytest.raises(RuntimeError, match='train_dataloader'):
            runner.train()
        runner.test()


class TestAttaching:
    def test_a_checkpoint_of_one_s_own_hook_stays(self, tmp_path):
        class Mine(CheckpointHook):
            pass

        cfg = toy.distilled(tmp_path)
        cfg.default_hooks.pop('checkpoint')
        runner = toy.build(cfg)
        mine = Mine()
        runner._hooks.clear()
        runner.register_default_hooks(dict(checkpoint=mine))
        assert [h for h in runner.hooks if isinstance(h, CheckpointHook)] == [
            mine
        ]

    def test_the_config_s_hooks_are_left_as_they_are(self, tmp_path):
        cfg = toy.distilled(tmp_path)
        runner = toy.build(cfg)
        assert cfg.default_hooks.checkpoint.type == 'CheckpointHook'
        assert runner.cfg.default_hooks.checkpoint.type == 'CheckpointHook'

    def test_priority_of_a_configured_hook(self, tmp_path):
        cfg = toy.distilled(tmp_path)
        cfg.custom_hooks = [
            dict(type='mmkd.TelemetryHook', priority='HIGHEST')
        ]
        runner = toy.build(cfg)
        assert type(runner.hooks[0]).__name__ == 'TelemetryHook'
        hook = dict(type='mmkd.LossCheckHook', priority='LOWEST')
        runner.register_hook(hook, priority='HIGHEST')
        assert type(runner.hooks[1]).__name__ == 'LossCheckHook'
        assert hook == dict(type='mmkd.LossCheckHook', priority='LOWEST')

    def test_an_error_leaves_the_stock_student(self, tmp_path):
        cfg = toy.distilled(tmp_path)
        cfg.param_scheduler = [dict(type='NoSuchScheduler')]
        runner = toy.build(cfg)
        keys = list(runner.model.state_dict())
        with pytest.raises(KeyError, match='NoSuchScheduler'):
            runner.train()
        assert list(runner.model.state_dict()) == keys
        assert 'loss' not in vars(runner.model)

    def test_data_without_class_names(self, tmp_path):
        cfg = toy.distilled(tmp_path)
        runner = toy.build(cfg)
        runner.train_loop.dataloader.dataset._metainfo.pop('classes')
        runner.train()  # as in stock training: a label is its number
        assert (tmp_path / 'epoch_1.pth').exists()

    def test_the_student_s_weights_are_initialised_as_ever(self, tmp_path):
        """Adapters keep the weights they were prepared with."""
        cfg = toy.distilled(tmp_path, images=2)
        cfg.optim_wrapper.optimizer.update(lr=0.0, weight_decay=0.0)
        runner = toy.build(cfg)
        kept = {}
        original = runner._init_model_weights

        def remember():
            state = runner.model.distillation.state_dict()
            kept.update({k: v.clone() for k, v in state.items()})
            original()

        runner._init_model_weights = remember
        runner.train()
        saved = toy.load(tmp_path / 'epoch_1.pth')['distillation']
        assert len(kept) == 10
        assert toy.same(
            saved['state_dict'],
            {f'distillation.{k}': v for k, v in kept.items()},
        )

    def test_adapters_are_the_same_for_one_seed(self, tmp_path):
        states = []
        for seed in (3, 3, 4):
            cfg = toy.distilled(tmp_path / str(len(states)), images=2)
            cfg.randomness.seed = seed
            cfg.optim_wrapper.optimizer.update(lr=0.0, weight_decay=0.0)
            toy.train(cfg)
            saved = toy.load(f'{cfg.work_dir}/epoch_1.pth')
            states.append(saved['distillation']['state_dict'])
        assert toy.same(states[0], states[1])
        assert not toy.same(states[0], states[2])


class TestWeights:
    def test_load_from_a_missing_file(self, tmp_path):
        cfg = toy.distilled(tmp_path)
        cfg.load_from = 'weights/no.pth'
        with pytest.raises(
            CheckpointError, match=r'weights/no\.pth does not exist.*Correct'
        ):
            toy.train(cfg)

    def test_a_distilled_checkpoint_is_tested_with_ema(self, tmp_path):
        """EMAHook loads strictly: nothing foreign may be in the file."""
        cfg = toy.distilled(tmp_path, images=2)
        cfg.custom_hooks = [dict(type='EMAHook')]
        toy.train(cfg)
        cfg.load_from = str(tmp_path / 'epoch_1.pth')
        cfg.model.test_cfg.rcnn.score_thr = 0.0
        metrics = toy.build(cfg).test()
        plain = toy.plain(tmp_path)
        plain.load_from = cfg.load_from
        plain.model.test_cfg.rcnn.score_thr = 0.0
        assert metrics == toy.build(plain).test()


def damaged(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({'state_dict': {'w': torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:1500])


def save(path, model, classes=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = dict(dataset_meta=dict(classes=classes or toy.stock_classes()))
    state = toy.detector(model).state_dict()
    torch.save(dict(meta=meta, state_dict=state), path)


BAD_INPUT = {
    'data': (
        lambda cfg, folder: cfg.train_dataloader.dataset.update(
            data_root='data/coco/'
        ),
        r'data/coco.*does not exist.*mmkd prepare coco',
    ),
    'missing teacher': (
        lambda cfg, folder: cfg.distillation.teacher.update(
            checkpoint='no/teacher.pth'
        ),
        r"'no/teacher\.pth' does not exist",
    ),
    'truncated teacher': (
        lambda cfg, folder: (
            damaged(folder / 't.pth'),
            cfg.distillation.teacher.update(checkpoint=str(folder / 't.pth')),
        ),
        r't\.pth \(1,500 bytes\).*truncated',
    ),
    'teacher of another architecture': (
        lambda cfg, folder: (
            save(folder / 't.pth', toy.plain(folder, toy.RETINANET).model),
            cfg.distillation.teacher.update(checkpoint=str(folder / 't.pth')),
        ),
        r't\.pth does not fit.*missing.*unexpected.*bbox_head',
    ),
    'no shared class': (
        lambda cfg, folder: (
            save(folder / 't.pth', cfg.model, [f'x{i}' for i in range(80)]),
            cfg.distillation.teacher.update(checkpoint=str(folder / 't.pth')),
        ),
        'share no class name',
    ),
    'unknown option': (
        lambda cfg, folder: cfg.distillation.methods.hint.update(levls=[0]),
        'no option "levls".*"levels"',
    ),
    'unknown method': (
        lambda cfg, folder: cfg.distillation.methods.hint.update(type='Hint'),
        r'"Hint" is not a registered method.*FeatureHint',
    ),
    'method that does not fit': (
        lambda cfg, folder: (
            setattr(cfg, 'model', toy.plain(folder, toy.RETINANET).model),
            setattr(cfg.distillation, 'methods', {'kd': toy.FRCNN}),
        ),
        r'fits Faster.*the student is RetinaNet.*mmkd\.FeatureHint',
    ),
    'misspelt key': (
        lambda cfg, folder: cfg.update(
            distilation=cfg.pop('distillation'),
        ),
        '"distilation" where "distillation"',
    ),
    'unknown hook option': (
        lambda cfg, folder: cfg.update(
            custom_hooks=[dict(type='mmkd.TelemetryHook', intervall=3)]
        ),
        '"intervall".*"interval"',
    ),
    'missing weights': (
        lambda cfg, folder: cfg.update(load_from='no.pth'),
        r'no\.pth does not exist',
    ),
    'damaged checkpoint to resume': (
        lambda cfg, folder: (
            damaged(folder / 'r.pth'),
            cfg.update(load_from=str(folder / 'r.pth'), resume=True),
        ),
        r'r\.pth \(1,500 bytes\) is no PyTorch checkpoint',
    ),
    'a loss that is not finite': (
        lambda cfg, folder: cfg.distillation.methods.hint.update(
            loss_weight=1e39  # beyond what a float32 holds
        ),
        r'hint\.loss_hint is NaN or infinite',
    ),
}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A work dir of an earlier run, which nobody may damage."""
    folder = tmp_path_factory.mktemp('trained')
    toy.train(toy.distilled(folder, images=2))
    return {
        name: (folder / name).read_bytes()
        for name in ('epoch_1.pth', 'last_checkpoint')
    }


@pytest.mark.parametrize('case', BAD_INPUT)
def test_bad_input_at_the_command_line(tmp_path, trained, case):
    spoil, message = BAD_INPUT[case]
    run = tmp_path / 'run'
    cfg = toy.distilled(run, images=2)
    spoil(cfg, tmp_path)
    path = toy.write(cfg, tmp_path / 'config.py')
    run.mkdir(exist_ok=True)
    for name, content in trained.items():
        (run / name).write_bytes(content)

    job = toy.tool(tmp_path / 'log', 'tools/train.py', path, cwd=tmp_path)
    assert job.process.exitcode == 1
    last = job.text().strip().splitlines()[-1]
    assert re.match(rf'error: .*{message}', last), job.text()[-3000:]
    assert 'Traceback' not in job.text()
    for name, content in trained.items():
        assert (run / name).read_bytes() == content
    assert [p.name for p in run.glob('*.pth*')] == ['epoch_1.pth']


def test_a_config_that_lacks_the_runner(tmp_path):
    """Stock runners would train without a teacher, and say nothing."""
    cfg = toy.distilled(tmp_path / 'run', images=2)
    cfg.pop('runner_type')
    path = toy.write(cfg, tmp_path / 'config.py')
    job = toy.tool(tmp_path / 'log', 'tools/train.py', path)
    assert job.process.exitcode == 1, job.text()[-500:]
    assert 'error: ' in job.text()
    assert "runner_type='mmkd.DistillationRunner'" in job.text()


def test_test_tool_on_a_distilled_config(tmp_path, trained):
    cfg = toy.distilled(tmp_path / 'run', images=2)
    path = toy.write(cfg, tmp_path / 'config.py')
    shutil.rmtree(tmp_path / 'run', ignore_errors=True)
    (tmp_path / 'epoch_1.pth').write_bytes(trained['epoch_1.pth'])
    job = toy.tool(
        tmp_path / 'log', 'tools/test.py', path, tmp_path / 'epoch_1.pth'
    )
    assert job.process.exitcode == 0, job.text()
    assert 'unexpected key' not in job.text()
    assert 'missing keys' not in job.text()
