"""Whole epochs of trainings: how much of its cost a teacher's cache saves."""

import argparse
import copy
import gc
import tempfile
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmkd.data.datasets import wrapped
from mmkd.engine.data_guard import explain_data_error
from mmkd.errors import ConfigError
from mmkd.teachers.build import kind_of
from mmkd.utils import whole_number

from .common import CONFIG, Benchmark, Times, load_config, untrained

PLAIN = 'plain student'
TEACHER = 'distilled, teacher as it is'
CACHE = 'distilled, `cache`, all images known'
KEPT = ('Load', 'Pack')
"""Transforms of a config that read images and make samples of them."""
VALIDATING = ('TeacherCheckHook', 'EnsembleValidationHook')
"""Hooks that need validation data, which no run has here."""


class EpochClock(Hook):
    """Count the seconds of each training epoch, loading included.

    Args:
        cpu_time: Count the process's seconds instead of the clock's.
    """

    priority = 'VERY_LOW'

    def __init__(self, *, cpu_time: bool) -> None:
        self.clock = time.process_time if cpu_time else time.perf_counter
        self.seconds: list[float] = []

    def before_train_epoch(self, runner: Runner) -> None:
        self.hits: list[float] = []
        gc.collect()
        wait(runner)
        self.start = self.clock()

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        self.hits += [v for k, v in outputs.items() if 'cache_hits' in k]

    def after_train_epoch(self, runner: Runner) -> None:
        wait(runner)
        self.seconds.append(self.clock() - self.start)


def wait(runner: Runner) -> None:
    if next(runner.model.parameters()).is_cuda:
        torch.cuda.synchronize()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure whole epochs: plain, distilled, and from the teacher's cache.

    Each is the second epoch of a training, the loading of images included:
    the first one warms up, and fills the cache. It reads the first images of
    the config's data, which are only resized.
    """
    if args.device == 'cpu' and torch.cuda.is_available():
        raise ConfigError(
            'these are epochs of real trainings, which use the GPU of this '
            'machine. Hide it with CUDA_VISIBLE_DEVICES= to measure the CPU.'
        )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the same in each run
        variants = configs_of(args, folder)
        rounds = [
            {name: second_epoch(cfg, args) for name, cfg in variants.items()}
            for _ in range(args.repeat)
        ]
    times = {name: [r[name][0] for r in rounds] for name in variants}
    return {'seconds': Times(times), 'batches': rounds[0][PLAIN][1]}


def epochs_table(result: Mapping[str, Any]) -> str:
    what = f'epoch of {result["batches"]} batches'
    return result['seconds'].table(what, PLAIN)


def configs_of(args: argparse.Namespace, folder: str) -> dict[str, Config]:
    """Return the config without distillation, as it is, and with a cache."""
    cfg = load_config(args)
    distillation = cfg.get('distillation') or {}
    teacher = distillation.get('teacher')
    single = teacher and kind_of(teacher) == 'FrozenDetector'
    if not single or distillation.get('peers'):
        raise ConfigError(
            'epochs takes a config with one frozen teacher and no peers, '
            f'but {args.config} is another.'
        )
    distilled = as_benchmark(cfg, args, folder)
    plain = copy.deepcopy(distilled)
    for key in ('distillation', 'runner_type'):
        plain.pop(key, None)
    distilled.distillation.teacher.pop('cache', None)
    cached = copy.deepcopy(distilled)
    cached.distillation.teacher.cache = dict(dir=f'{folder}/cache')
    return {PLAIN: plain, TEACHER: distilled, CACHE: cached}


def as_benchmark(cfg: Config, args: argparse.Namespace, folder: str) -> Config:
    """Change a config to two epochs on a few images, without side effects."""
    cfg.model.backbone.init_cfg = None
    cfg.model.data_preprocessor.pop('batch_augments', None)
    cfg.distillation.teacher = untrained(cfg.distillation.teacher)
    cfg.work_dir, cfg.randomness = folder, dict(seed=0)
    cfg.load_from, cfg.resume, cfg.visualizer = None, False, None
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2)
    cfg.default_hooks = {**cfg.get('default_hooks', {}), 'checkpoint': None}
    cfg.custom_hooks = [
        hook
        for hook in cfg.get('custom_hooks') or []
        if named(hook) not in VALIDATING
    ]
    for key in ('val_cfg', 'val_dataloader', 'val_evaluator'):
        cfg[key] = None
    cfg.optim_wrapper.optimizer.lr, cfg.param_scheduler = 1e-6, []
    cfg.train_dataloader = dict(
        batch_size=args.batch,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=True),
        dataset=some_images(cfg.train_dataloader.dataset, args),
    )
    return cfg


def some_images(dataset: Any, args: argparse.Namespace) -> Any:
    """Take the first images of the innermost data set, only resized."""
    steps: list[Any] = []
    steps += dataset.get('pipeline', [])
    while inner := wrapped(dataset):
        dataset = inner[0]
        steps += dataset.get('pipeline', [])
    height, width = args.size
    load, pack = (
        [step for step in steps if named(step).startswith(name)]
        for name in KEPT
    )
    resize = dict(type='Resize', scale=(width, height), keep_ratio=False)
    dataset.update(indices=args.images, pipeline=[*load, resize, *pack])
    return dataset


def named(described: Mapping[str, Any]) -> str:
    """Return the class of a transform or hook, without its scope."""
    kind = described['type']
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2]


def second_epoch(cfg: Config, args: argparse.Namespace) -> tuple[float, int]:
    """Train in this process, from the same weights each time.

    Returns:
        The second epoch's seconds, and the number of its batches.

    Raises:
        ConfigError: If a cache did not know all of its images.
        DataError: If the images are not there.
    """
    cfg = copy.deepcopy(cfg)
    cfg.experiment_name = f'epochs-{time.monotonic_ns()}'
    clock = EpochClock(cpu_time=args.cpu_time)
    if 'distillation' in cfg:
        runner = RUNNERS.build(cfg)
    else:
        runner = Runner.from_cfg(cfg)
    runner.register_hook(clock)
    with explain_data_error(cfg, 'train'):
        runner.train()
    if any(hit < 1 for hit in clock.hits):
        raise ConfigError(
            'the cache did not know all images in the second epoch. It holds '
            f'up to 10 GiB in {cfg.work_dir}, where the disk has room. Give '
            'fewer --images or a smaller --size.'
        )
    return clock.seconds[-1], len(runner.train_dataloader)


OPTIONS: dict[str, dict[str, Any]] = {
    **CONFIG,
    '--images': dict(type=whole_number(1), default=12, help='per epoch'),
}
EPOCHS = Benchmark('epochs', OPTIONS, measure, epochs_table)
