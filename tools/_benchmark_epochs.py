"""Whole epochs of a training: what the teacher's cache leaves of its cost."""

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from _benchmark import load_config, ratio_table, untrain
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmkd.utils import ConfigError

PLAIN = 'plain student'
TEACHER = 'distilled, teacher as it is'
CACHE = 'distilled, `cache`, all images known'
KEPT = ('Load', 'Pack')
"""Transforms of a config that read images and make samples of them."""


class EpochClock(Hook):
    """Seconds of each training epoch: its images are loaded within.

    Args:
        cpu_time: The process's seconds instead of the clock's.
    """

    priority = 'VERY_LOW'

    def __init__(self, *, cpu_time: bool) -> None:
        self.clock = time.process_time if cpu_time else time.perf_counter
        self.seconds: list[float] = []

    def before_train_epoch(self, runner: Runner) -> None:
        self.wait(runner)
        self.start = self.clock()

    def after_train_epoch(self, runner: Runner) -> None:
        self.wait(runner)
        self.seconds.append(self.clock() - self.start)

    @staticmethod
    def wait(runner: Runner) -> None:
        if next(runner.model.parameters()).is_cuda:
            torch.cuda.synchronize()


def epochs(
    args: argparse.Namespace, device: str
) -> tuple[dict[str, Any], str]:
    """Seconds of epochs, plain, distilled, and from a cache, in turn."""
    if device == 'cpu' and torch.cuda.is_available():
        raise ConfigError(
            'epochs are those of a training, which takes the GPU that is '
            'there: hide it with CUDA_VISIBLE_DEVICES= to measure the CPU.'
        )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the same in each epoch
        variants = configs_of(args, folder)
        rounds = [
            {name: one_epoch(cfg, args) for name, cfg in variants.items()}
            for _ in range(args.repeat + 1)
        ]
    first, *counted = rounds  # warms up, and fills the cache
    times = {name: [r[name] for r in counted] for name in variants}
    result = {'seconds': times, 'first_seconds': first}
    text = (
        f'{ratio_table("epoch", times, PLAIN)}\n\nThe epoch that fills the '
        f'cache: {first[CACHE]:.4g} s.'
    )
    return result, text


def configs_of(args: argparse.Namespace, folder: str) -> dict[str, Config]:
    """The config, as it is, without distillation, and with a cache."""
    cfg = load_config(args)
    distillation = cfg.get('distillation') or {}
    if not isinstance(distillation.get('teacher'), Mapping):
        raise ConfigError(
            f'epochs takes a config with one teacher, {args.config} has '
            f'{distillation.get("teacher")}.'
        )
    distilled = as_benchmark(cfg, args, folder)
    plain = copy.deepcopy(distilled)
    for key in ('distillation', 'runner_type'):
        plain.pop(key)
    cached = copy.deepcopy(distilled)
    cached.distillation.teacher.cache = dict(dir=f'{folder}/cache')
    return {PLAIN: plain, TEACHER: distilled, CACHE: cached}


def as_benchmark(cfg: Config, args: argparse.Namespace, folder: str) -> Config:
    """One epoch on some images of one size, without chance or files."""
    cfg.model.backbone.init_cfg = None
    untrain(cfg.distillation.teacher)
    cfg.work_dir, cfg.randomness = folder, dict(seed=0)
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
    cfg.default_hooks.checkpoint, cfg.custom_hooks = None, []
    for key in ('val_cfg', 'val_dataloader', 'val_evaluator'):
        cfg[key] = None
    cfg.train_dataloader.update(
        batch_size=args.batch, num_workers=0, persistent_workers=False
    )
    dataset = cfg.train_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    dataset.indices = args.images
    height, width = args.size
    load, pack = (
        [step for step in dataset.pipeline if step.type.startswith(name)]
        for name in KEPT
    )
    resize = dict(type='Resize', scale=(width, height), keep_ratio=False)
    dataset.pipeline = [*load, resize, *pack]
    return cfg


def one_epoch(cfg: Config, args: argparse.Namespace) -> float:
    """Train for an epoch in this process, from the same weights each time."""
    cfg = copy.deepcopy(cfg)
    cfg.experiment_name = f'epochs-{time.monotonic_ns()}'
    clock = EpochClock(cpu_time=args.cpu_time)
    if 'runner_type' in cfg:
        runner = RUNNERS.build(cfg)
    else:
        runner = Runner.from_cfg(cfg)
    runner.register_hook(clock)
    runner.train()
    (seconds,) = clock.seconds
    return seconds
