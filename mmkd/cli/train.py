"""Train a detector; a config with `distillation` distils.

Examples:
    mmkd train mmkd::faster_rcnn_kd_r50.py
    mmkd train my_config.py --work-dir work_dirs/mine --resume
    mmkd train my_config.py --cfg-options train_cfg.max_epochs=2
"""

import argparse
from collections.abc import Sequence

from mmengine.config import Config

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
    if 'distillation' in cfg and 'runner_type' not in cfg:
        raise ConfigError(
            f'{args.config} has `distillation`, but not the runner that '
            "distils: set runner_type='mmkd.DistillationRunner'"
        )
    return cfg


def main(argv: Sequence[str] | None = None) -> None:
    build_runner(load_config(parse_args(argv))).train()
