"""Measure what distillation costs: time and memory, a table per command.

Examples:
    mmkd benchmark step mmkd::faster_rcnn_kd_r50.py --batch 1
    mmkd benchmark methods mmkd::bccd/methods/{kd,cwd}.py
    mmkd benchmark methods mmkd::cwd_retinanet_r50.py --references
    mmkd benchmark teacher mmkd::pkd_faster_rcnn_r50.py --batch 1
    mmkd benchmark epochs mmkd::pkd_faster_rcnn_r50.py --images 12
    mmkd benchmark assign --costs paa_big/epoch_12.pth
    mmkd benchmark scale mmkd::lad_r50.py --objects 10 200
    mmkd benchmark scale mmkd::bccd/peers/dml.py --networks 2 3
    mmkd benchmark scale mmkd::bccd/peers/dcm.py --networks
    mmkd benchmark scale mmkd::kd_retinanet_r50.py --processes 1 2

What is compared runs in turn, again and again, in one process, so that a busy
machine slows all of it down alike; the first round is not counted. On a GPU
the seconds are those between two of its events, otherwise those of the clock;
``--cpu-time`` counts the seconds that the process computes, whatever else the
machine does. The last line says what the numbers were measured on: paste it
with the table. ``mmkd benchmark COMMAND --help`` says what a command measures.
"""

import argparse
import inspect
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmkd.data.checkpoint_loader import safe_checkpoints
from mmkd.errors import ConfigError
from mmkd.utils import add_cfg_options, whole_number

from .assign import ASSIGN
from .epochs import EPOCHS
from .machine import environment, measured_on
from .scale import SCALE
from .step import METHODS, STEP
from .teacher import TEACHER

BENCHMARKS = {
    each.name: each for each in (STEP, METHODS, TEACHER, EPOCHS, ASSIGN, SCALE)
}
OPTIONS: dict[str, dict[str, Any]] = {
    '--size': dict(
        type=whole_number(1),
        nargs=2,
        default=[800, 1333],
        metavar=('H', 'W'),
        help='height and width of the images, in pixels',
    ),
    '--batch': dict(type=whole_number(1), default=2, help='images per batch'),
    '--repeat': dict(
        type=whole_number(1), default=7, help='rounds that are counted'
    ),
    '--threads': dict(type=whole_number(1), default=1, help='CPU threads'),
    '--device': dict(default='auto', help='cpu, cuda or auto'),
    '--cpu-time': dict(
        action='store_true',
        help='count the seconds that the process computes (CPU only)',
    ),
    '--json': dict(type=Path, help='write the result to this file'),
}
"""The options of every benchmark."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='mmkd benchmark',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest='command', required=True)
    for name, benchmark in BENCHMARKS.items():
        about = inspect.getdoc(benchmark.measure) or ''
        command = commands.add_parser(
            name,
            help=about.partition('\n')[0],
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for flag, settings in {**OPTIONS, **benchmark.options}.items():
            command.add_argument(flag, **settings)
        add_cfg_options(command)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    logging.disable(logging.WARNING)  # a line for each parameter
    torch.set_num_threads(args.threads)
    if args.device == 'auto':
        args.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if args.device not in ('cpu', 'cuda'):
        raise ConfigError(
            f'--device takes cpu, cuda or auto, got {args.device!r}.'
        )
    if args.cpu_time and args.device == 'cuda':
        raise ConfigError(
            '--cpu-time counts what the CPU computes, but the device is '
            'cuda. Add --device cpu, or leave --cpu-time out.'
        )
    found = environment(args)  # before a benchmark changes it
    benchmark = BENCHMARKS[args.command]
    with safe_checkpoints():
        result = benchmark.measure(args)
    print(f'{benchmark.table(result)}\n\n{measured_on(found)}')
    if args.json:
        args.json.write_text(json.dumps({**found, **result}, indent=2))
