"""How the cost of an iteration grows: with objects, pixels, processes."""

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as torch_dist
from mmengine.model import MMDistributedDataParallel

from mmkd.errors import ConfigError
from mmkd.utils import whole_number

from .common import (
    CONFIG,
    Benchmark,
    Times,
    Trainer,
    altered,
    each,
    in_processes,
    table,
    teacher_of,
)
from .networks import measure_networks, networks_table
from .step import parts_of


def as_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition('x')
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(
            f'expected height x width, such as 480x640, got {text!r}'
        )
    return int(height), int(width)


OPTIONS: dict[str, dict[str, Any]] = {
    **CONFIG,
    '--objects': dict(
        type=whole_number(0),
        nargs='+',
        default=[10, 200],
        help='objects per image; with another option only the first number',
    ),
    '--sizes': dict(
        type=as_size, nargs='+', metavar='HxW', help='sizes of images, pixels'
    ),
    '--processes': dict(
        type=whole_number(1), nargs='+', help='numbers of processes'
    ),
    '--networks': dict(
        type=whole_number(1),
        nargs='*',
        help="numbers of students; the config's where none is given",
    ),
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure how the cost of an iteration grows.

    By default with the objects in an image: the distilled iteration with few
    and with many of them. With --sizes: the distilled iteration against its
    parts, for images of several sizes. With --processes: the distilled
    iteration against the plain one, both wrapped for distributed training.
    With --networks: the iteration of several students together against the
    sum of what each costs alone (and the frozen teacher's forward), with the
    memory of each. Without a number, and for methods that fix the number of
    their networks (DCM, FFSD), the networks are the config's.
    """
    asked = [kind for kind in GROWTHS if vars(args)[kind] is not None]
    asked.remove('objects')
    if len(asked) > 1:
        raise ConfigError(
            f'one benchmark measures one growth, but --{" and --".join(asked)}'
            ' are given. Leave all but one of them out.'
        )
    if not asked:
        return {'growth': 'objects', **measure_objects(args)}
    args = altered(args, objects=args.objects[0])
    return {'growth': asked[0], **GROWTHS[asked[0]][0](args)}


def growth_table(result: Mapping[str, Any]) -> str:
    return GROWTHS[result['growth']][1](result)


# ------------------------------------------------------------------- objects


def measure_objects(args: argparse.Namespace) -> dict[str, Any]:
    """Time the distilled iteration with few and many objects per image."""
    runs = {
        str(number): Trainer.of(altered(args, objects=number)).distilled
        for number in args.objects
    }
    return {'seconds': Times.interleaved(runs, args)}


def objects_table(result: Mapping[str, Any]) -> str:
    times = result['seconds']
    return times.table('objects per image', next(iter(times)))


# --------------------------------------------------------------------- sizes


def measure_sizes(args: argparse.Namespace) -> dict[str, Any]:
    """Time the distilled iteration and its parts, by the size of images."""
    sizes = {'x'.join(map(str, size)): size for size in args.sizes}

    def measure(name: str) -> dict[str, Any]:
        own = altered(args, size=sizes[name])
        times = parts_of(Trainer.of(own), own)
        ratios = times.ratios('distilled', 'plain', 'teacher')
        return {'seconds': times, 'ratios': ratios}

    return {'sizes': each(sizes, measure, size_row)}


def sizes_table(result: Mapping[str, Any]) -> str:
    header = ['height x width', 'plain s', 'teacher s', 'distilled s']
    header += ['distilled / (plain + teacher)']
    rows = [size_row(*found) for found in result['sizes'].items()]
    return table(header, rows)


def size_row(name: str, found: Mapping[str, Any]) -> list[Any]:
    medians = map(statistics.median, found['seconds'].values())
    return [name, *medians, found['ratios']]


# ----------------------------------------------------------------- processes


def measure_processes(args: argparse.Namespace) -> dict[str, Any]:
    """Time wrapped iterations in several processes, with a batch each."""
    available = torch.cuda.device_count()
    if args.device == 'cuda' and max(args.processes) > available:
        raise ConfigError(
            f'--processes {max(args.processes)} needs as many GPUs, but this '
            f'machine has {available}. Ask for fewer, or add --device cpu.'
        )

    def measure(number: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            store = f'file://{folder}/store'
            times = in_processes(number, one_process, args, number, store)[0]
        return {
            'seconds': times,
            'ratios': times.ratios('distilled', 'plain'),
        }

    return {'processes': each(args.processes, measure, process_row)}


def processes_table(result: Mapping[str, Any]) -> str:
    header = ['processes', 'plain s', 'distilled s', 'distilled / plain']
    rows = [process_row(*found) for found in result['processes'].items()]
    return table(header, rows)


def process_row(number: int, found: Mapping[str, Any]) -> list[Any]:
    return [number, *found['seconds'].values(), found['ratios']]


def one_process(
    args: argparse.Namespace, number: int, store: str, rank: int
) -> Times:
    """Time a plain and a distilled student in one of the processes.

    Both are wrapped as MMEngine wraps them.
    """
    torch.set_num_threads(args.threads)
    if args.device == 'cuda':
        torch.cuda.set_device(rank)
    torch_dist.init_process_group(
        'nccl' if args.device == 'cuda' else 'gloo',
        init_method=store,
        rank=rank,
        world_size=number,
    )
    plain, distilled = Trainer.of(args, distils=False), Trainer.of(args)
    assert distilled.distiller
    teacher_of(distilled.distiller)
    distilled.distiller.attach()
    for trainer in (plain, distilled):
        trainer.model = MMDistributedDataParallel(
            module=trainer.student, broadcast_buffers=False
        )
    runs = {'plain': plain.step, 'distilled': distilled.step}
    times = Times.interleaved(runs, args)
    torch_dist.barrier()
    torch_dist.destroy_process_group()
    return times


GROWTHS = {
    'objects': (measure_objects, objects_table),
    'sizes': (measure_sizes, sizes_table),
    'processes': (measure_processes, processes_table),
    'networks': (measure_networks, networks_table),
}
"""How to measure each growth, and the table of its result."""

SCALE = Benchmark('scale', OPTIONS, measure, growth_table)
