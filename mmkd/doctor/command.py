"""Examine a config that distils, before the long run.

Builds the networks as training does, runs a batch and says what was loaded,
what meets what, which way each loss pulls and what it costs. The exit status
is 1, with a list of findings, if something is wrong.

Examples:
    mmkd doctor mmkd::faster_rcnn_kd_r50.py --eval 100
    mmkd doctor CONFIG --cfg-options train_dataloader.batch_size=2
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mmkd.detectors.source import load_config
from mmkd.utils import add_cfg_options

from . import Report, diagnose


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='mmkd doctor',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', help='config with `distillation`')
    parser.add_argument(
        '--eval',
        type=int,
        default=0,
        metavar='N',
        help="the teacher's metrics on N validation images (0: skip)",
    )
    parser.add_argument('--json', type=Path, help='write the result there too')
    add_cfg_options(parser)
    return parser.parse_args(argv)


def show(report: Report, path: Path | None = None) -> int:
    """Print a report; returns the exit status."""
    print(report.text(), flush=True)
    if path is not None:
        content = {
            'findings': report.findings,
            'sections': report.sections,
            **report.values,
        }
        path.write_text(json.dumps(content, indent=1) + '\n')
    return 1 if report.findings else 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    cfg = load_config(args.config)
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    return show(diagnose(cfg, evaluate=args.eval), args.json)
