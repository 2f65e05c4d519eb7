"""A run that is killed and resumed is the uninterrupted one, bit for bit."""

import copy
import logging
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from mmdet.datasets import CocoDataset
from mmengine.dataset import DefaultSampler
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, HOOKS
from torch.utils.data import RandomSampler

from mmkd.engine import provenance
from mmkd.engine.checkpoint import latest_checkpoint
from mmkd.errors import CheckpointError
from tests.helpers import toy


def config(work_dir, *, workers=0, epochs=3, iters=None, **options):
    """Random augmentations, two-stage sampling, EMA, one kept checkpoint."""
    cfg = toy.distilled(
        work_dir,
        methods={'kd': toy.FRCNN},
        epochs=epochs,
        images=6,
        **options,
    )
    cfg.train_dataloader.dataset.pipeline.insert(
        -1, dict(type='PhotoMetricDistortion')
    )
    cfg.train_dataloader.update(
        num_workers=workers, persistent_workers=workers > 0
    )
    cfg.optim_wrapper.optimizer = dict(
        type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4
    )
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=6)
    ]
    cfg.custom_hooks = [dict(type='EMAHook', momentum=0.1)]
    cfg.default_hooks.checkpoint = dict(
        type='CheckpointHook', interval=1, max_keep_ckpts=1
    )
    if iters is not None:
        cfg.train_cfg = dict(
            type='IterBasedTrainLoop', max_iters=iters, val_interval=3
        )
        cfg.train_dataloader.sampler.type = 'InfiniteSampler'
        cfg.train_dataloader.pop('batch_sampler')
        cfg.default_hooks.checkpoint.by_epoch = False
        cfg.log_processor = dict(by_epoch=False)
    return cfg


def outcome(path):
    """All of a checkpoint that training has made."""
    checkpoint = toy.load(path)
    # When it was saved, by which run, and where to.
    for key in ('time', 'experiment_name', 'cfg'):
        checkpoint['meta'].pop(key)
    hub = checkpoint.pop('message_hub')
    checkpoint['learning_rate'] = hub['log_scalars']['train/lr'].data[1][-1:]
    return checkpoint


def assert_same_outcome(one, other):
    one, other = outcome(one), outcome(other)
    assert one.keys() == other.keys()
    for key in one:
        if key == 'learning_rate':
            assert list(one[key]) == list(other[key])
        else:
            assert not toy.differing(one[key], other[key], key)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    runs = {}

    def run(workers):
        if workers not in runs:
            folder = tmp_path_factory.mktemp(f'whole{workers}')
            job = toy.tool(
                folder / 'log', 'tools/train.py', cli_config(folder, workers)
            )
            assert job.process.exitcode == 0, job.text()
            assert [p.name for p in (folder / 'run').glob('*.pth')] == [
                'epoch_3.pth'
            ]
            runs[workers] = folder / 'run' / 'epoch_3.pth'
        return runs[workers]

    return run


def cli_config(folder, workers):
    cfg = config(folder / 'run', workers=workers)
    cfg.custom_imports = dict(imports=['tests.helpers.toy'])
    cfg.custom_hooks.append(dict(type='ToyKillAt'))
    return toy.write(cfg, folder / 'config.py')


# Where a run is killed: the checkpoints that it leaves.
MOMENTS = {
    'within an epoch': ['epoch_1.pth'],
    'while writing': ['epoch_1.pth'],
    'before last_checkpoint': ['epoch_1.pth', 'epoch_2.pth'],
    'after a save': ['epoch_1.pth', 'epoch_2.pth'],
    'in validation': ['epoch_2.pth'],
}


@pytest.mark.parametrize(
    ('moment', 'workers'),
    [
        pytest.param(
            moment,
            workers,
            marks=[pytest.mark.slow]
            * (
                workers == 0
                and moment not in ('while writing', 'after a save')
            ),
        )
        for workers in (0, 2)
        for moment in MOMENTS
    ],
)
def test_killed_and_resumed(tmp_path, uninterrupted, moment, workers):
    expected = uninterrupted(workers)
    path, run = cli_config(tmp_path, workers), tmp_path / 'run'
    job = toy.tool(
        *(tmp_path / 'killed', 'tools/train.py', path, '--work-dir', run),
        env=dict(TOY_KILL_AT=moment),
    )
    writing = moment == 'while writing'
    ended_by = signal.SIGXFSZ if writing else signal.SIGKILL
    assert job.process.exitcode == -ended_by, job.text()
    saved = sorted(p.name for p in run.glob('*.pth'))
    assert saved == MOMENTS[moment]
    for name in saved:
        toy.load(run / name)  # whole
    named = Path((run / 'last_checkpoint').read_text()).name
    assert named == saved[0 if moment == 'before last_checkpoint' else -1]
    assert any(run.glob('.epoch_2.pth.*.tmp')) == writing

    job = toy.tool(
        *(tmp_path / 'log', 'tools/train.py', path),
        *('--work-dir', run, '--resume'),
    )
    assert job.process.exitcode == 0, job.text()
    assert 'bit for bit' not in job.text()
    assert [p.name for p in run.glob('*.pth')] == ['epoch_3.pth']
    assert not list(run.glob('.*'))  # what was being written, and the lock
    assert_same_outcome(expected, run / 'epoch_3.pth')


def train_and_resume(cfg, tmp_path, *steps, name='epoch_{}.pth'):
    """Train to the end; then again, from the checkpoint after each step."""
    cfg.default_hooks.checkpoint.max_keep_ckpts = -1
    whole = tmp_path / 'whole'
    cfg.work_dir = str(whole)
    toy.train(copy.deepcopy(cfg))
    for step in steps:
        resumed = tmp_path / f'resumed{step}'
        resumed.mkdir()
        shutil.copy(whole / name.format(step), resumed)
        again = copy.deepcopy(cfg)
        again.work_dir, again.resume = str(resumed), True
        runner = toy.build(again)
        warnings = Warnings(runner)
        runner.train()
        assert not warnings.about('bit for bit')
        last = name.format(runner.max_epochs)
        if 'iter' in name:
            last = name.format(runner.max_iters)
        assert_same_outcome(whole / last, resumed / last)
    return whole, resumed


class Warnings(logging.Handler):
    def __init__(self, runner):
        super().__init__(logging.WARNING)
        self.texts = []
        runner.logger.addHandler(self)

    def emit(self, record):
        self.texts.append(record.getMessage())

    def about(self, words):
        return [text for text in self.texts if words in text]


def test_a_seed_that_nobody_chose(tmp_path):
    cfg = config(tmp_path, epochs=2)
    cfg.randomness = dict(seed=None)
    train_and_resume(cfg, tmp_path, 1)


@pytest.mark.parametrize('val_workers', [0, 1])
def test_validation_every_second_epoch_and_the_best(tmp_path, val_workers):
    """The second validation, whose workers are there, draws no more."""
    cfg = config(tmp_path, epochs=4)
    cfg.train_cfg.val_interval = 2
    cfg.model.test_cfg.rcnn.score_thr = 0.0  # detections, hence metrics
    cfg.val_dataloader.update(
        num_workers=val_workers, persistent_workers=val_workers > 0
    )
    cfg.default_hooks.checkpoint.save_best = 'coco/bbox_mAP'
    whole, _ = train_and_resume(cfg, tmp_path, 1, 2, 3)
    (best,) = whole.glob('best_*')  # of epoch 2: saved by the first alone
    assert_same_outcome(best, tmp_path / 'resumed1' / best.name)


@pytest.mark.parametrize('workers', [0, 2, 3])
def test_iterations(tmp_path, workers):
    """From the middle, and from before a validation."""
    cfg = config(tmp_path, workers=workers, iters=6)
    train_and_resume(cfg, tmp_path, 3, 4, name='iter_{}.pth')


@pytest.mark.usefixtures('photos')
def test_resumed_twice(tmp_path):
    """The second time from a resumed run's checkpoint."""
    cfg = config(tmp_path, workers=2, iters=6)
    again = copy.deepcopy(cfg)
    whole, resumed = train_and_resume(cfg, tmp_path, 3, name='iter_{}.pth')
    again.work_dir, again.resume = str(resumed), True
    again.load_from = str(resumed / 'iter_5.pth')
    again.default_hooks.checkpoint.max_keep_ckpts = -1
    (resumed / 'iter_6.pth').unlink()
    toy.train(again)
    assert_same_outcome(whole / 'iter_6.pth', resumed / 'iter_6.pth')


def test_a_loader_that_is_exhausted(tmp_path):
    """Iterations over a finite sampler, grouped by aspect ratio."""
    cfg = config(tmp_path, iters=5)
    cfg.train_dataloader.sampler.type = 'DefaultSampler'
    cfg.train_dataloader.batch_sampler = dict(type='AspectRatioBatchSampler')
    train_and_resume(cfg, tmp_path, 4, name='iter_{}.pth')


def by_iteration(cfg):
    """Let it save after every iteration of its epochs."""
    cfg.default_hooks.checkpoint.by_epoch = False
    return cfg


class Reset(Hook):
    """Begins every epoch anew, in ways that would show when done twice."""

    def before_train_epoch(self, runner):
        self.epochs = getattr(self, 'epochs', 0) + 1
        self.started = time.time  # no checkpoint holds it
        with torch.no_grad():
            for parameter in runner.model.backbone.layer4.parameters():
                parameter.mul_(0.9)
        for group in runner.optim_wrapper.optimizer.param_groups:
            group['lr'] *= 0.8

    def after_train_iter(self, runner, *_, **__):
        assert self.started() > 0


class TestWithinAnEpoch:
    """Three batches are an epoch, and two of them a step or none."""

    @pytest.mark.parametrize(
        ('workers', 'persistent'),
        [
            pytest.param(0, False, marks=pytest.mark.slow),
            pytest.param(2, False, marks=pytest.mark.slow),
            (2, True),
        ],
    )
    def test_grouped_and_averaged(self, tmp_path, workers, persistent):
        cfg = by_iteration(config(tmp_path, workers=workers, epochs=2))
        cfg.train_dataloader.persistent_workers = persistent
        cfg.train_cfg.max_epochs = 3
        train_and_resume(cfg, tmp_path, 1, 3, 5, name='iter_{}.pth')

    def test_hooks_that_begin_an_epoch(self, tmp_path, monkeypatch):
        monkeypatch.setitem(HOOKS.module_dict, 'ToyReset', Reset)
        cfg = by_iteration(plain(tmp_path, epochs=2))
        cfg.custom_hooks = [dict(type='ToyReset'), dict(type='EMAHook')]
        cfg.optim_wrapper.accumulative_counts = 2
        cfg.optim_wrapper.optimizer.momentum = 0.9
        whole, _ = train_and_resume(cfg, tmp_path, 4, name='iter_{}.pth')
        assert remembered(whole / 'iter_6.pth')['hooks.Reset.epochs'] == 2

    def test_a_sampler_with_a_generator_of_its_own(self, tmp_path):
        """PyTorch's draws the seed of an epoch from the global generator."""
        cfg = by_iteration(plain(tmp_path, epochs=3))
        cfg.train_dataloader.update(num_workers=1, persistent_workers=True)
        cfg.train_dataloader.sampler = dict(type='ToyRandomSampler')
        cfg.train_dataloader.pop('batch_sampler')
        train_and_resume(cfg, tmp_path, 2, 4, name='iter_{}.pth')

    @pytest.mark.slow
    def test_a_sampler_with_a_memory(self, tmp_path, monkeypatch):
        """It is what it was when the epoch began, and runs again."""
        monkeypatch.setitem(DATA_SAMPLERS.module_dict, 'ToyMoving', Moving)
        cfg = by_iteration(plain(tmp_path, epochs=3))
        cfg.train_dataloader.sampler = dict(type='ToyMoving')
        cfg.train_dataloader.pop('batch_sampler')
        train_and_resume(cfg, tmp_path, 1, 4, 5, name='iter_{}.pth')

    def test_resumed_twice(self, tmp_path):
        cfg = by_iteration(plain(tmp_path, epochs=2, images=10))
        cfg.train_dataloader.update(num_workers=3, persistent_workers=True)
        again = copy.deepcopy(cfg)
        whole, resumed = train_and_resume(cfg, tmp_path, 1, name='iter_{}.pth')
        again.work_dir, again.resume = str(resumed), True
        again.load_from = str(resumed / 'iter_3.pth')
        (resumed / 'iter_10.pth').unlink()
        toy.train(again)
        assert_same_outcome(whole / 'iter_10.pth', resumed / 'iter_10.pth')

    def test_nothing_is_loaded_twice(self, tmp_path, monkeypatch):
        cfg = by_iteration(plain(tmp_path, epochs=1))
        toy.train(copy.deepcopy(cfg))
        cfg.resume, cfg.load_from = True, str(tmp_path / 'iter_2.pth')
        loaded = []
        get = CocoDataset.__getitem__
        monkeypatch.setattr(
            CocoDataset,
            '__getitem__',
            lambda data, index: loaded.append(index) or get(data, index),
        )
        toy.train(cfg)
        assert len(loaded) == 2

    @pytest.mark.slow
    def test_a_cache_of_images(self, tmp_path):
        cfg = by_iteration(cached(plain(tmp_path, epochs=2)))
        train_and_resume(cfg, tmp_path, 1, 4, name='iter_{}.pth')

    @pytest.mark.slow
    def test_the_switch_of_yolox(self, tmp_path):
        cfg = by_iteration(yolox(tmp_path))
        train_and_resume(cfg, tmp_path, 4, 7, 8, name='iter_{}.pth')


@DATA_SAMPLERS.register_module(name='ToyRandomSampler', force=True)
class Shuffled(RandomSampler):
    def __init__(self, dataset, seed):
        super().__init__(dataset)


class Moving(DefaultSampler):
    """Begins each pass where the last one has ended."""

    start = 0

    def __iter__(self):
        for index in range(len(self.dataset)):
            self.start += 1
            yield (index * 5 + self.start) % len(self.dataset)


def what_is_said(cfg, tmp_path, step, name='epoch_{}.pth', **changes):
    """Train, resume from a step, and return why that was not exact."""
    cfg.default_hooks.checkpoint.max_keep_ckpts = -1
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.work_dir = str(tmp_path)
    toy.train(copy.deepcopy(cfg))
    cfg.merge_from_dict(changes)
    cfg.resume = True
    cfg.load_from = str(tmp_path / name.format(step))
    runner = toy.build(cfg)
    warnings = Warnings(runner)
    runner.train()
    (text,) = warnings.about('The resumed run will not equal')
    return text


class TestWhatIsNotExactIsSaid:
    def test_within_an_epoch_of_other_data(self, tmp_path):
        cfg = by_iteration(plain(tmp_path, epochs=1))
        text = what_is_said(
            cfg,
            tmp_path,
            2,
            'iter_{}.pth',
            **{'train_dataloader.batch_size': 3},
        )
        assert (
            'within an epoch, which starts again, because it had 3 batches '
            'and now has 2'
        ) in text

    def test_within_an_epoch_without_saying_where(self, tmp_path):
        cfg = by_iteration(plain(tmp_path, epochs=1))
        toy.train(copy.deepcopy(cfg))
        path = tmp_path / 'iter_2.pth'
        checkpoint = toy.load(path)
        checkpoint['distillation']['random_states'][0].pop('within')
        torch.save(checkpoint, path)
        cfg.resume, cfg.load_from = True, str(path)
        runner = toy.build(cfg)
        warnings = Warnings(runner)
        runner.train()
        assert warnings.about('starts again, because it does not say where')
        assert (runner.epoch, runner.iter) == (1, 5)

    def test_a_sampler_that_draws_while_it_runs(self, tmp_path, monkeypatch):
        class Drawing(DefaultSampler):
            def __iter__(self):
                for _ in self.dataset:
                    yield torch.randint(len(self.dataset), ()).item()

        monkeypatch.setitem(DATA_SAMPLERS.module_dict, 'ToyDrawing', Drawing)
        cfg = by_iteration(plain(tmp_path, epochs=1))
        cfg.train_dataloader.sampler = dict(type='ToyDrawing')
        cfg.train_dataloader.pop('batch_sampler')
        text = what_is_said(cfg, tmp_path, 2, 'iter_{}.pth')
        assert 'draws from the global random numbers while it runs' in text

    def test_workers_that_cannot_skip(self, tmp_path):
        cfg = config(tmp_path, workers=1, iters=3)
        cfg.train_dataloader.batch_sampler = dict(
            type='AspectRatioBatchSampler'
        )
        text = what_is_said(cfg, tmp_path, 2, 'iter_{}.pth')
        assert 'cannot skip' in text
        assert 'num_workers=0' in text

    def test_another_number_of_workers(self, tmp_path):
        cfg = config(tmp_path, workers=1, epochs=2)
        text = what_is_said(
            cfg,
            tmp_path,
            1,
            **{
                'train_dataloader.num_workers': 0,
                'train_dataloader.persistent_workers': False,
            },
        )
        assert 'num_workers' in text

    def test_a_cache_of_images_in_a_worker(self, tmp_path):
        cfg = cached(config(tmp_path, workers=1, epochs=2))
        text = what_is_said(cfg, tmp_path, 1)
        assert 'what could not be saved is lost' in text
        assert (
            'data.pipeline.transforms[2].results_cache (in a worker of the '
            'data loader)'
        ) in text

    def test_a_checkpoint_without_memories(self, tmp_path):
        cfg = plain(tmp_path, epochs=2)
        toy.train(copy.deepcopy(cfg))
        path = tmp_path / 'epoch_1.pth'
        checkpoint = toy.load(path)
        checkpoint['distillation'].pop('memories')
        torch.save(checkpoint, path)
        cfg.resume, cfg.load_from = True, str(path)
        runner = toy.build(cfg)
        warnings = Warnings(runner)
        runner.train()
        assert warnings.about('does not hold what modules, transforms and')

    def test_a_stock_checkpoint(self, tmp_path):
        cfg = config(tmp_path, epochs=2)
        cfg.default_hooks.checkpoint.max_keep_ckpts = -1
        cfg.distillation = None
        plain = copy.deepcopy(cfg)
        plain.pop('runner_type')
        plain.work_dir = str(tmp_path)
        toy.train(plain)
        cfg.work_dir, cfg.resume = str(tmp_path), True
        cfg.load_from = str(tmp_path / 'epoch_1.pth')
        runner = toy.build(cfg)
        warnings = Warnings(runner)
        runner.train()
        assert warnings.about('holds no random states')


def cached(cfg):
    """Let the pipeline keep images from epoch to epoch."""
    cfg.train_dataloader.dataset.pipeline[2:2] = [
        dict(type='CachedMosaic', img_scale=(96, 96), max_cached_images=4)
    ]
    return cfg


def plain(tmp_path, base=toy.RETINANET, *, epochs=3, val=False, **data):
    """Plain training by the runner, which is quicker than distillation."""
    cfg = toy.plain(tmp_path, base, epochs=epochs, **{'images': 6, **data})
    cfg.runner_type = toy.RUNNER
    cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=-1)
    if not val:
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    return cfg


def yolox(tmp_path):
    """Random sizes, the mode switch, EMA, and two batches in a step."""
    name = 'yolox/yolox_tiny_8xb8-300e_coco.py'
    cfg = plain(tmp_path, name, images=6, batch=2)
    cfg.model.backbone.widen_factor = 0.125
    cfg.model.neck.update(
        in_channels=[32, 64, 128], out_channels=32, num_csp_blocks=1
    )
    cfg.model.bbox_head.update(in_channels=32, feat_channels=32)
    cfg.model.data_preprocessor.batch_augments[0].update(
        random_size_range=(64, 160), interval=2, size_divisor=32
    )
    cfg.custom_hooks = [
        dict(type='YOLOXModeSwitchHook', num_last_epochs=1, priority=48),
        dict(type='EMAHook', momentum=0.1, priority=49),
    ]
    cfg.optim_wrapper.accumulative_counts = 2
    return cfg


def memories(path):
    """What the checkpoint of a single process holds beyond state dicts."""
    (memory,) = toy.load(path)['distillation']['memories']
    return memory


def remembered(path):
    return {
        f'{owner}.{name}': value
        for owner, _, name, value in memories(path)['attributes']
    }


class TestWhatStateDictsLack:
    """State of modules, transforms and hooks in plain attributes."""

    def test_the_size_of_yolox(self, tmp_path):
        """Its stock recipe: random sizes, mode switch, EMA; and mixed steps.

        The size is drawn every second iteration, 3 are an epoch, and two
        batches make a step, so that every epoch ends in the middle of both.
        """
        cfg = yolox(tmp_path)
        whole, _ = train_and_resume(cfg, tmp_path, 1, 2)
        assert '_input_size' in str([*remembered(whole / 'epoch_1.pth')])
        assert 'hooks.YOLOXModeSwitchHook._has_switched' in remembered(
            whole / 'epoch_3.pth'
        )

    def test_the_thresholds_of_dynamic_rcnn(self, tmp_path):
        cfg = plain(tmp_path, 'dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py')
        cfg.model.train_cfg.rcnn.dynamic_rcnn.update_iter_interval = 2
        whole, _ = train_and_resume(cfg, tmp_path, 1)
        found = remembered(whole / 'epoch_1.pth')
        assert len(found['model.roi_head.iou_history']) == 1
        assert 'model.roi_head.bbox_assigner.pos_iou_thr' in found

    def test_gradients_between_two_steps(self, tmp_path):
        """Four batches are a step, six an epoch; adapters have gradients."""
        cfg = toy.distilled(tmp_path, toy.RETINANET, images=6, batch=1)
        cfg.train_cfg.max_epochs = 2
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
        cfg.optim_wrapper.accumulative_counts = 4
        whole, _ = train_and_resume(cfg, tmp_path, 1)
        names = memories(whole / 'epoch_1.pth')['gradients']
        assert any(name.startswith('distillation.methods') for name in names)
        assert not memories(whole / 'epoch_2.pth')['gradients']  # the last one

    def test_gradients_between_two_steps_of_iterations(self, tmp_path):
        cfg = plain(tmp_path, images=4, batch=1)
        cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=6)
        cfg.train_dataloader.sampler.type = 'InfiniteSampler'
        cfg.train_dataloader.pop('batch_sampler')
        cfg.default_hooks.checkpoint.by_epoch = False
        cfg.log_processor = dict(by_epoch=False)
        cfg.optim_wrapper.accumulative_counts = 4
        train_and_resume(cfg, tmp_path, 3, 4, name='iter_{}.pth')

    def test_a_cache_of_images(self, tmp_path):
        train_and_resume(cached(plain(tmp_path, epochs=2)), tmp_path, 1)

    def test_another_pipeline_with_a_cache(self, tmp_path):
        """It is in place when the cache that belongs to it is restored."""
        cfg = plain(tmp_path, epochs=4)
        later = cached(copy.deepcopy(cfg)).train_dataloader.dataset.pipeline
        cfg.custom_hooks = [
            dict(
                type='PipelineSwitchHook',
                switch_epoch=1,
                switch_pipeline=later,
            )
        ]
        train_and_resume(cfg, tmp_path, 1, 3)

    def test_how_long_a_metric_has_not_risen(self, tmp_path):
        """Stops after 4 of 8 epochs; the first is the best."""
        cfg = plain(tmp_path, epochs=8, images=2, val=True)
        cfg.val_evaluator = dict(type='ToyFalling')
        cfg.default_hooks.checkpoint.update(
            save_best='falling', rule='greater'
        )
        cfg.custom_hooks = [
            dict(
                type='EarlyStoppingHook',
                **dict(monitor='falling', rule='greater'),
                **dict(min_delta=0, patience=3),
            )
        ]
        whole = tmp_path / 'whole'
        cfg.work_dir = str(whole)
        toy.train(copy.deepcopy(cfg))
        saved = sorted(path.name for path in whole.glob('epoch_*'))
        assert saved == [f'epoch_{number}.pth' for number in (1, 2, 3, 4)]
        for epoch in (1, 3, 4):
            resumed = tmp_path / str(epoch)
            resumed.mkdir()
            shutil.copy(whole / f'epoch_{epoch}.pth', resumed)
            cfg.work_dir, cfg.resume = str(resumed), True
            toy.train(copy.deepcopy(cfg))
            assert not (resumed / 'epoch_5.pth').exists()
            assert_same_outcome(whole / 'epoch_4.pth', resumed / 'epoch_4.pth')

    def test_the_stop_is_saved_with_the_best(self, tmp_path):
        """The checkpoint that is saved again, when all hooks have acted."""
        cfg = plain(tmp_path, epochs=3, images=2, val=True)
        cfg.val_evaluator = dict(type='ToyFalling')
        cfg.default_hooks.checkpoint.update(
            save_best='falling', rule='greater'
        )
        cfg.custom_hooks = [
            dict(
                type='EarlyStoppingHook',
                **dict(monitor='falling', rule='greater'),
                stopping_threshold=5,
            )
        ]
        toy.train(copy.deepcopy(cfg))
        assert memories(tmp_path / 'epoch_1.pth')['stopped']
        cfg.resume = True
        toy.train(cfg)
        assert not (tmp_path / 'epoch_2.pth').exists()

    def test_no_annotations(self, tmp_path):
        """Evaluation marks them; a checkpoint would hold them three times."""
        cfg = plain(tmp_path, toy.FASTER_RCNN, epochs=2, images=2, val=True)
        cfg.model.test_cfg.rcnn.score_thr = 0.0
        toy.train(cfg)
        names = remembered(tmp_path / 'epoch_2.pth')
        assert not [name for name in names if name.startswith('metrics.')]

    def test_nothing_without_need(self, tmp_path):
        """A stock Faster R-CNN remembers nothing but its steps.

        LossCheckHook counts them, too: it warns after the first 50.
        """
        cfg = plain(tmp_path, toy.FASTER_RCNN, epochs=1, images=2)
        runner = toy.build(cfg)
        warnings = Warnings(runner)
        runner.train()
        assert not warnings.about('cannot be saved')
        memory = memories(tmp_path / 'epoch_1.pth')
        assert not memory['gradients']
        assert {each[0] for each in memory['attributes']} <= {
            'hooks.LossCheckHook',
            'optim_wrapper',
            'sampler',
        }


class Forgetful(Hook):
    """Changes in ways that a checkpoint cannot hold."""

    def __init__(self):
        self.seen, self.counted = 0, None

    def after_train_iter(self, runner, *_, **__):
        self.seen += 1
        self.counted = iter(range(3))


class TestWhatCannotBeSavedIsNamed:
    def said(self, tmp_path, hook):
        cfg = plain(tmp_path, epochs=2, images=2)
        runner = toy.build(cfg)
        runner.register_hook(hook)
        warnings = Warnings(runner)
        runner.train()
        (text,) = warnings.about('cannot be saved')  # once
        return text

    def test_an_iterator(self, tmp_path):
        text = self.said(tmp_path, Forgetful())
        assert 'hooks.Forgetful.counted (range_iterator)' in text
        assert 'seen' not in text
        memory = memories(tmp_path / 'epoch_1.pth')
        assert ['hooks.Forgetful', 'attribute', 'seen', 1] in (
            memory['attributes']
        )

    def test_a_hook_that_acts_after_the_save(self, tmp_path):
        class Late(Hook):
            priority = 'LOWEST'
            epochs = 0

            def after_train_epoch(self, runner):
                self.epochs += 1

        text = self.said(tmp_path, Late())
        assert 'hooks.Late (acts after the checkpoint hook' in text


class TestMadeWithSomethingElse:
    """A run that goes on with another teacher, weight, option or code."""

    def said(self, tmp_path, change):
        cfg = toy.distilled(tmp_path, toy.RETINANET, epochs=2, images=2)
        cfg.default_hooks.checkpoint.max_keep_ckpts = -1
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
        whole = copy.deepcopy(cfg)
        whole.train_cfg.max_epochs = 1
        cfg.train_cfg.max_epochs = 1
        toy.train(whole)
        cfg.resume = True
        change(cfg)
        runner = toy.build(cfg)
        warnings = Warnings(runner)
        runner.train()
        return warnings.about('made with')

    def test_the_same(self, tmp_path):
        assert not self.said(tmp_path, lambda cfg: None)

    def test_a_weight_and_an_option(self, tmp_path):
        def change(cfg):
            cfg.distillation.methods.hint = dict(
                type='mmkd.FeatureHint', loss_weight=0.5, resize=True
            )

        (text,) = self.said(tmp_path, change)
        assert 'methods.hint.loss_weight: nothing → 0.5' in text
        assert 'methods.hint.resize: nothing → True' in text
        assert 'weights' not in text

    def test_other_weights_of_the_teacher(self, tmp_path):
        def change(cfg):
            cfg.randomness.seed = 4  # of which the untrained teacher is made
            cfg.distillation.teacher.config.model.bbox_head.loss_cls.gamma = 1

        (text,) = self.said(tmp_path, change)
        assert re.search(r'weights\.teacher: \w+ → \w+', text)
        assert 'loss_cls.gamma: 2.0 → 1' in text

    def test_other_code(self, tmp_path, monkeypatch):
        monkeypatch.setattr(provenance, '_mmkd', lambda: 'a')

        def change(cfg):
            monkeypatch.setattr(provenance, '_mmkd', lambda: 'b')

        (text,) = self.said(tmp_path, change)
        assert 'code.the files of mmkd: a → b' in text

    def test_another_max_epochs_and_schedule(self, tmp_path):
        def change(cfg):
            cfg.train_cfg.max_epochs = 2
            cfg.custom_hooks = [
                dict(type='mmkd.WeightScheduleHook', stop_at=3)
            ]

        (text,) = self.said(tmp_path, change)
        assert 'train_cfg.max_epochs: 1 → 2' in text
        assert "'stop_at': '3'" in text


class TestWhichCheckpoint:
    @pytest.fixture
    def folder(self, tmp_path):
        for number in (1, 2, 3):
            path = tmp_path / f'epoch_{number}.pth'
            torch.save({'meta': {}, 'number': number}, path)
            stamp = time.time() - 100 + number
            os.utime(path, (stamp, stamp))
        torch.save({}, tmp_path / 'best_coco_bbox_mAP_epoch_1.pth')
        self.point(tmp_path, 2)
        return tmp_path

    def point(self, folder, number):
        path = folder / f'epoch_{number}.pth'
        (folder / 'last_checkpoint').write_text(str(path))

    def test_the_one_it_points_to(self, folder):
        assert Path(latest_checkpoint(folder)).name == 'epoch_2.pth'

    @pytest.mark.parametrize('content', [None, '', '\n', '/gone/epoch_9.pth'])
    def test_else_the_newest(self, folder, content):
        pointer = folder / 'last_checkpoint'
        pointer.unlink() if content is None else pointer.write_text(content)
        assert Path(latest_checkpoint(folder)).name == 'epoch_3.pth'

    @pytest.mark.parametrize('size', [0, 300])
    def test_else_the_newest_whole_one(self, folder, size):
        with open(folder / 'epoch_3.pth', 'r+b') as file:
            file.truncate(size)
        self.point(folder, 3)
        assert Path(latest_checkpoint(folder)).name == 'epoch_2.pth'

    def test_none(self, tmp_path):
        assert latest_checkpoint(tmp_path) is None

    def test_none_is_whole(self, folder):
        for path in folder.glob('epoch_*.pth'):
            with open(path, 'r+b') as file:
                file.truncate(200)
        with pytest.raises(
            CheckpointError, match=r'epoch_2\.pth is truncated \(200 bytes\)'
        ):
            latest_checkpoint(folder)

    def test_a_run_resumes_it(self, tmp_path):
        cfg = config(tmp_path, epochs=2)
        cfg.default_hooks.checkpoint.max_keep_ckpts = -1
        toy.train(copy.deepcopy(cfg))
        expected = tmp_path / 'expected.pth'
        (tmp_path / 'epoch_2.pth').rename(expected)
        (tmp_path / 'last_checkpoint').write_text('')
        shutil.move(expected, tmp_path / 'keep')
        cfg.resume = True
        runner = toy.build(cfg)
        warnings = Warnings(runner)
        runner.train()
        assert warnings.about('last_checkpoint is missing')
        assert_same_outcome(tmp_path / 'keep', tmp_path / 'epoch_2.pth')

    def test_nothing_to_resume_is_said(self, tmp_path):
        cfg = config(tmp_path, epochs=1)
        cfg.resume = True
        runner = toy.build(cfg)
        warnings = Warnings(runner)
        runner.train()
        assert warnings.about('starts from scratch')


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved')
    cfg = config(folder)
    cfg.train_cfg.max_epochs = 1
    cfg.custom_hooks = []
    toy.train(cfg)
    return folder / 'epoch_1.pth'


class TestResumingSomethingElse:
    def resume(self, tmp_path, saved, **changes):
        cfg = config(tmp_path)
        cfg.custom_hooks = []
        cfg.resume, cfg.load_from = True, str(saved)
        cfg.update(changes)
        return cfg

    def test_other_methods(self, tmp_path, saved):
        cfg = self.resume(tmp_path, saved)
        cfg.distillation.methods = {'hint': toy.HINT}
        with pytest.raises(
            CheckpointError,
            match=r'saved with other distillation methods: 20 of their weights'
            r'.*methods\.hint\.adapters.*got nothing.*load_from',
        ):
            toy.train(cfg)

    def test_no_distillation(self, tmp_path, saved):
        cfg = self.resume(tmp_path, saved)
        cfg.pop('distillation')
        with pytest.raises(
            CheckpointError,
            match=r'parameters .* differ from those.*load_from',
        ):
            toy.train(cfg)

    def test_weights_alone(self, tmp_path, saved):
        path = tmp_path / 'weights.pth'
        torch.save(toy.load(saved)['state_dict'], path)
        with pytest.raises(CheckpointError, match=r'only weights.*load_from'):
            toy.train(self.resume(tmp_path, path))

    def test_start_from_its_student(self, tmp_path, saved):
        """load_from takes the student; adapters that do not fit are new."""
        cfg = self.resume(tmp_path, saved, resume=False)
        cfg.distillation.methods = {'hint': toy.HINT}
        cfg.custom_hooks = [dict(type='EMAHook')]
        cfg.optim_wrapper.optimizer.lr = 0.0
        cfg.train_cfg.max_epochs = 1
        toy.train(cfg)
        weights = toy.load(tmp_path / 'epoch_1.pth')
        for name, value in toy.load(saved)['state_dict'].items():
            if 'running' not in name and 'num_batches' not in name:
                assert toy.same(weights['state_dict'][name], value), name
        kept = weights['distillation']['state_dict']
        assert all('methods.hint' in name for name in kept)

    def test_a_missing_file(self, tmp_path):
        cfg = self.resume(tmp_path, tmp_path / 'no.pth')
        with pytest.raises(CheckpointError, match=r'no\.pth.*does not exist'):
            toy.train(cfg)
