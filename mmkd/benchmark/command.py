"""What distillation costs: time and memory, each command a table.

Examples:
    mmkd benchmark step mmkd::faster_rcnn_kd_r50.py --batch 1
    mmkd benchmark methods mmkd::bccd/methods/{kd,cwd}.py
    mmkd benchmark teacher mmkd::pkd_faster_rcnn_r50.py --batch 1
    mmkd benchmark epochs mmkd::pkd_faster_rcnn_r50.py --images 12
    mmkd benchmark assign --costs paa_big/epoch_12.pth
    mmkd benchmark scale mmkd::lad_r50.py --objects 10 200
    mmkd benchmark scale mmkd::bccd/peers/dml.py --networks 2 3
    mmkd benchmark scale mmkd::bccd/peers/dcm.py --networks
    mmkd benchmark scale mmkd::kd_retinanet_r50.py --processes 1 2

What is compared runs in turn, again and again, in one process, so that a busy
machine slows all of it alike; a first round is not counted. On a GPU the
seconds are those between two of its events, else the clock's; ``--cpu-time``
counts the seconds that the process computes, whatever others do on the
machine. The last line says what was measured on: paste it with the table.

``step``: the plain student's iteration (forward, backward, optimiser), the
teacher's forward under ``no_grad`` (what the methods read, no more) and the
distilled iteration; peak memory is that of a fresh process for each.
``methods``: what the methods of each config take beyond both networks, their
losses and the gradients of these, as a share of the plain iteration.
``teacher``: its forward with each of its options, and iterations with some of
them. ``epochs``: the second epochs of trainings, with the loading of images,
plain, distilled and from the teacher's cache, on the first images of the data,
which are resized and not changed otherwise. ``assign``: the batched mixture
fit against scikit-learn's, and LAD against MMDetection's own detector.
``scale``: the distilled iteration with few and with many objects; with
``--sizes`` against its parts, for images of several sizes; with
``--processes`` against the plain one, both wrapped for distributed training;
with ``--networks`` the iteration of so many students together against the sum
of what each costs alone (and the frozen teacher's forward), with the memory of
each. Without a number, and for methods that fix the number of their networks
(DCM, FFSD), the networks are the config's.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from mmkd.errors import ConfigError, DataError
from mmkd.utils import add_cfg_options

from .assign import assign
from .epochs import epochs
from .machine import environment, measured_on
from .scale import scale
from .step import methods, step
from .teacher import teacher

COMMANDS = {
    **{'step': step, 'methods': methods, 'teacher': teacher},
    **{'epochs': epochs, 'assign': assign, 'scale': scale},
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='mmkd benchmark',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest='command', required=True)
    one = commands.add_parser('step', help='one training iteration')
    one.add_argument('config', help='config with `distillation`')
    many = commands.add_parser('methods', help='one iteration of each config')
    many.add_argument('configs', nargs='+', help='configs with `distillation`')
    options = commands.add_parser('teacher', help="the teacher's options")
    options.add_argument('config', help='config with `distillation`')
    options.add_argument(
        '--compile', action='store_true', help='too; takes minutes to compile'
    )
    options.add_argument(
        '--forward', action='store_true', help='no iterations'
    )
    whole = commands.add_parser('epochs', help='a training, with a cache')
    whole.add_argument('config', help='config with `distillation`')
    whole.add_argument('--images', type=int, default=12, help='of an epoch')
    fit = commands.add_parser('assign', help='LAD and its mixtures')
    fit.add_argument('--config', default='mmkd::lad_r50.py')
    fit.add_argument(
        '--costs', type=Path, help='a PAA checkpoint of BCCD, for real costs'
    )
    growth = commands.add_parser('scale', help='cost against objects')
    growth.add_argument('config', help='config with `distillation`')
    other = growth.add_mutually_exclusive_group()
    other.add_argument(
        '--networks',
        type=int,
        nargs='*',
        help="numbers of students, instead; none: the config's",
    )
    other.add_argument(
        '--sizes', type=as_size, nargs='+', metavar='HxW', help='or of pixels'
    )
    other.add_argument(
        '--processes', type=int, nargs='+', help='or of processes'
    )
    for command in (one, many, options, whole, fit, growth):
        add_common(command)
    for command in (one, many, options, fit):
        command.add_argument('--objects', type=int, default=8)
    growth.add_argument('--objects', type=int, nargs='+', default=[10, 200])
    return parser.parse_args(argv)


def as_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition('x')
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(
            f'expected height x width, such as 480x640, got {text!r}'
        )
    return int(height), int(width)


def add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        '--size', type=int, nargs=2, default=[800, 1333], metavar=('H', 'W')
    )
    command.add_argument('--batch', type=int, default=2, help='images')
    command.add_argument('--repeat', type=int, default=7, help='rounds')
    command.add_argument('--threads', type=int, default=1, help='CPU threads')
    command.add_argument('--device', default='auto', help='cpu, cuda or auto')
    command.add_argument(
        '--cpu-time',
        action='store_true',
        help="the process's seconds, not the clock's; on the CPU",
    )
    command.add_argument('--json', type=Path, help='write the result there')
    add_cfg_options(command)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    logging.disable(logging.WARNING)  # a line for each parameter
    torch.set_num_threads(args.threads)
    device = args.device
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if args.cpu_time and device == 'cuda':
        raise SystemExit('error: --cpu-time is for the CPU: --device cpu.')
    found = environment(args, device)  # before the commands change it
    try:
        result, table = COMMANDS[args.command](args, device)
    except (ConfigError, DataError) as error:
        raise SystemExit(f'error: {error}') from error
    print(f'{table}\n\n{measured_on(found)}')
    if args.json:
        content = {**found, **result}
        args.json.write_text(json.dumps(content, indent=2))
