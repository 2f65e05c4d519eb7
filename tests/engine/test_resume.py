"""A run that is killed and resumed is the uninterrupted one, bit for bit."""

import copy
import logging
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

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
            assert toy.same(one[key], other[key]), key


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
    assert (run / 'epoch_2.pth.tmp').exists() == writing

    job = toy.tool(
        *(tmp_path / 'log', 'tools/train.py', path),
        *('--work-dir', run, '--resume'),
    )
    assert job.process.exitcode == 0, job.text()
    assert 'bit for bit' not in job.text()
    assert [p.name for p in run.glob('*.pth')] == ['epoch_3.pth']
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
    (text,) = warnings.about('bit for bit')
    return text


class TestWhatIsNotExactIsSaid:
    def test_a_checkpoint_within_an_epoch(self, tmp_path):
        cfg = config(tmp_path, epochs=1)
        cfg.default_hooks.checkpoint.by_epoch = False
        text = what_is_said(cfg, tmp_path, 2, 'iter_{}.pth')
        assert 'within an epoch, which starts again' in text

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

    def test_a_cache_of_images(self, tmp_path):
        cfg = config(tmp_path, epochs=2)
        cfg.train_dataloader.dataset.pipeline[2:2] = [
            dict(type='CachedMosaic', img_scale=(96, 96), max_cached_images=4)
        ]
        assert 'cache of images' in what_is_said(cfg, tmp_path, 1)

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
