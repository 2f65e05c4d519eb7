"""Test a detector; a distilled checkpoint is a stock one.

Examples:
    mmkd test mmkd::faster_rcnn_kd_r50.py epoch_12.pth
    mmkd test CONFIG CHECKPOINT --json-prefix work_dirs/kd/val
    mmkd test CONFIG CHECKPOINT --tta
    mmkd test ENSEMBLE_CONFIG  # its members have checkpoints
"""

import argparse
import copy
import logging
import os.path as osp
from collections.abc import Sequence
from typing import Any

from mmdet.engine.hooks.utils import trigger_visualization_hook
from mmdet.evaluation import DumpDetResults
from mmdet.models import DetTTAModel
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log

from mmkd.data.checkpoint_loader import safe_checkpoints, trusts
from mmkd.data.datasets import leaves
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
        '--tta',
        action='store_true',
        help='test-time augmentation, by tta_model and tta_pipeline of the '
        'config, or else the image and its mirror image',
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
    if args.tta:
        augment(cfg)
    return cfg


def check_checkpoint(cfg: Config, path: str | None) -> None:
    """Only an ensemble, whose members have theirs, does without."""
    ensemble = name_of(cfg.model) == 'EnsembleDetector'
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
    coco = [e for e in evaluators if name_of(e).endswith('CocoMetric')]
    if not coco:
        raise ConfigError(
            '--json-prefix needs a CocoMetric in test_evaluator, the config '
            f'has {", ".join(map(name_of, evaluators))}'
        )
    coco[0].outfile_prefix = prefix


def name_of(cfg: ConfigDict) -> str:
    """The name of a type, which may be a class, without its scope."""
    kind = cfg.get('type')
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]


TTA_MODEL = dict(
    type='DetTTAModel',
    tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
)
"""MMDetection's model for test-time augmentation where a config has none."""
MIRRORED = dict(
    type='TestTimeAug',
    transforms=[
        [
            dict(type='mmdet.RandomFlip', prob=1.0),
            dict(type='mmdet.RandomFlip', prob=0.0),
        ],
        [
            dict(
                type='mmdet.PackDetInputs',
                meta_keys=(
                    *('img_id', 'img_path', 'ori_shape', 'img_shape'),
                    *('scale_factor', 'flip', 'flip_direction'),
                ),
            )
        ],
    ],
)
"""What takes the place of a pipeline's PackDetInputs: both mirror images."""


def augment(cfg: Config) -> None:
    """Test with augmented images, as MMDetection's tools/test.py --tta does.

    Raises:
        ConfigError: If the test pipeline cannot be augmented.
    """
    missing = [key for key in ('tta_model', 'tta_pipeline') if key not in cfg]
    if missing:
        print_log(
            f'The config has no {" and no ".join(missing)}: --tta takes '
            "MMDetection's, the image and its mirror image",
            'current',
            logging.WARNING,
        )
    for dataset in leaves(cfg.test_dataloader.dataset):
        dataset.pipeline = cfg.get('tta_pipeline') or mirrored(dataset)
    wrapper = cfg.get('tta_model') or copy.deepcopy(TTA_MODEL)
    cfg.model = ConfigDict(**wrapper, module=cfg.model)


def mirrored(dataset: ConfigDict) -> list[dict]:
    steps = list(dataset.get('pipeline') or [])
    last = name_of(steps[-1]) if steps else 'nothing'
    if last != 'PackDetInputs':
        raise ConfigError(
            '--tta replaces PackDetInputs at the end of the test pipeline, '
            f'which ends in {last}. Give the config a tta_pipeline.'
        )
    return [*copy.deepcopy(steps[:-1]), copy.deepcopy(MIRRORED)]


def check_no_masks(model: Any) -> None:
    """Refuse what MMDetection cannot merge before the test has begun."""
    if isinstance(model, DetTTAModel) and getattr(
        model.module, 'with_mask', False
    ):
        raise ConfigError(
            f'--tta merges boxes, and {type(model.module).__name__} gives '
            'masks as well, which MMDetection cannot merge. Test it without '
            '--tta, or give the config a tta_model that can.'
        )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise ConfigError(f'--out must end in .pkl, got {args.out}')
    cfg = load_config(args)
    with safe_checkpoints(trusts(cfg)):
        runner = build_runner(cfg)
        if args.tta:
            check_no_masks(runner.model)
        if args.out:
            runner.test_evaluator.metrics.append(
                DumpDetResults(out_file_path=args.out)
            )
        runner.test()
