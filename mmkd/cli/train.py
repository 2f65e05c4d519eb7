"""Train a detector; a config with `distillation` distils.

Examples:
    mmkd train mmkd::faster_rcnn_kd_r50.py
    mmkd train my_config.py --work-dir work_dirs/mine --resume
    mmkd train my_config.py --cfg-options train_cfg.max_epochs=2
"""

import argparse
from collections.abc import Sequence

from mmengine.config import Config
from mmengine.runner import Runner

from mmkd.data.checkpoint_loader import safe_checkpoints, trusts
from mmkd.engine.checkpoint import checkpoint_folders, latest_checkpoint
from mmkd.engine.preemption import PreemptionHook
from mmkd.engine.runner import DistillationRunner, check_runner
from mmkd.engine.work_dir import check_no_training, one_training
from mmkd.errors import ConfigError

from .common import add_arguments, build_runner, read_config


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='mmkd train',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument(
        '--amp', action='store_true', help='mixed-precision training'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate to the batch size',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from a checkpoint, or from the latest of the work dir',
    )
    return parser.parse_args(argv)


def load_config(args: argparse.Namespace) -> Config:
    cfg = read_config(args)
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise ConfigError(
                '--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=…) '
                f'in {args.config}'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    check_runner(cfg, args.config)
    return cfg


def main(argv: Sequence[str] | None = None) -> None:
    cfg = load_config(parse_args(argv))
    check_no_training(cfg.work_dir)  # before anything is written there
    with safe_checkpoints(trusts(cfg)):
        train(build_runner(cfg))


def train(runner: Runner) -> None:
    if not isinstance(runner, DistillationRunner):
        if runner._resume and runner._load_from is None:
            # MMEngine would follow last_checkpoint wherever it leads.
            folders = checkpoint_folders(runner.hooks)
            runner._load_from = latest_checkpoint(runner.work_dir, *folders)
        runner.logger.warning(
            f'{type(runner).__name__} resumes weights, the optimiser and '
            'schedules, and nothing else: a run that is resumed draws other '
            'random numbers, and forgets gradients between two steps and what '
            'modules, transforms and hooks remember. With '
            "runner_type='mmkd.DistillationRunner', which trains without "
            '`distillation` too, a resumed run equals the uninterrupted one.'
        )
        preemption = PreemptionHook()
        runner.register_hook(preemption)
        with one_training(runner.work_dir), preemption.watching(runner):
            runner.train()
    else:
        runner.train()
