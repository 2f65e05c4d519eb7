"""Test a detector; a distilled checkpoint is a stock one.

Examples:
    mmkd test mmkd::faster_rcnn_kd_r50.py epoch_12.pth
    mmkd test CONFIG CHECKPOINT --json-prefix work_dirs/kd/val
    mmkd test ENSEMBLE_CONFIG  # its members have checkpoints
"""

import argparse
import os.path as osp
from collections.abc import Sequence

from mmdet.engine.hooks.utils import trigger_visualization_hook
from mmdet.evaluation import DumpDetResults
from mmengine.config import Config

from mmkd.errors import ConfigError

from .common import add_arguments, build_runner, read_config


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='mmkd test',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help='checkpoint file; none for an mmkd.EnsembleDetector',
    )
    parser.add_argument(
        '--out', help='pickle of the predictions, for offline evaluation'
    )
    parser.add_argument(
        '--json-prefix',
        help='write COCO results to PREFIX.bbox.json, for `mmkd eval`',
    )
    parser.add_argument(
        '--show', action='store_true', help='show the predictions'
    )
    parser.add_argument('--show-dir', help='save painted images there')
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds per shown image'
    )
    return parser.parse_args(argv)


def load_config(args: argparse.Namespace) -> Config:
    cfg = read_config(args)
    check_checkpoint(cfg, args.checkpoint)
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        cfg = trigger_visualization_hook(cfg, args)
    if args.json_prefix:
        set_json_prefix(cfg, args.json_prefix)
    return cfg


def check_checkpoint(cfg: Config, path: str | None) -> None:
    """Only an ensemble, whose members have theirs, does without."""
    ensemble = cfg.model.type == 'mmkd.EnsembleDetector'
    if path is None and not ensemble:
        raise ConfigError('the checkpoint is missing: CONFIG CHECKPOINT')
    if path is not None and ensemble:
        raise ConfigError(
            f'an ensemble takes no checkpoint, got {path}: its members name '
            'theirs in the config'
        )
    if path and not osp.exists(path) and '://' not in path:
        raise ConfigError(f'the checkpoint {path} does not exist')


def set_json_prefix(cfg: Config, prefix: str) -> None:
    """Let the COCO metric of the test write its results."""
    evaluators = cfg.test_evaluator
    if not isinstance(evaluators, list | tuple):
        evaluators = [evaluators]
    coco = [e for e in evaluators if e.type.endswith('CocoMetric')]
    if not coco:
        raise ConfigError(
            '--json-prefix needs a CocoMetric in test_evaluator, the config '
            f'has {", ".join(e.type for e in evaluators)}'
        )
    coco[0].outfile_prefix = prefix


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise ConfigError(f'--out must end in .pkl, got {args.out}')
    runner = build_runner(load_config(args))
    if args.out:
        runner.test_evaluator.metrics.append(
            DumpDetResults(out_file_path=args.out)
        )
    runner.test()
