"""How the cost of an iteration grows: with objects, pixels, processes."""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from mmengine.model import MMDistributedDataParallel

from .common import (
    Trainer,
    build,
    build_student,
    interleaved,
    spread,
    teacher_of,
)
from .networks import networks
from .step import ratios

Times = Mapping[str, list[float]]


def scale(args: argparse.Namespace, device: str) -> tuple[dict[str, Any], str]:
    """The growth that the arguments ask for; by default with objects."""
    if args.networks is not None:
        return networks(args, device)
    if args.sizes:
        return sizes(args, device)
    if args.processes:
        return processes(args, device)
    return objects(args, device)


def objects(
    args: argparse.Namespace, device: str
) -> tuple[dict[str, Any], str]:
    """The distilled iteration with few and with many objects an image."""
    runs = {}
    for number in args.objects:
        each = argparse.Namespace(**{**vars(args), 'objects': number})
        distiller, batch = build(each, device)
        trainer = Trainer(distiller.student, batch, distiller)
        runs[str(number)] = trainer.distilled
    times = interleaved(runs, args, device)
    rows = ['| objects an image | median s | range | to the first |']
    rows.append('|---|---|---|---|')
    first = next(iter(times.values()))
    for number, values in times.items():
        growth = statistics.median(
            [v / f for v, f in zip(values, first, strict=True)]
        )
        rows.append(f'| {number} | {spread(values)} | {growth:.3f} |')
    return {'seconds': times}, '\n'.join(rows)


def sizes(args: argparse.Namespace, device: str) -> tuple[dict[str, Any], str]:
    """The distilled iteration against its parts, by the images' size."""
    rows = [
        '| height x width | plain s | teacher s | distilled s | '
        'distilled / (plain + teacher) | range |',
        '|---|---|---|---|---|---|',
    ]
    result = {}
    args.objects = args.objects[0]
    for size in args.sizes:
        each = argparse.Namespace(**{**vars(args), 'size': size})
        measured = ratios(each, device)
        times, found = measured['all_seconds'], measured['all_ratios']
        name = 'x'.join(map(str, size))
        result[name] = {'seconds': times, 'ratios': found}
        medians = [f'{statistics.median(v):.3f}' for v in times.values()]
        rows.append(
            f'| {name} | {" | ".join(medians)} | '
            f'**{statistics.median(found):.3f}** | '
            f'{min(found):.3f}-{max(found):.3f} |'
        )
        print(rows[-1], flush=True)
    return {'sizes': result}, '\n'.join(rows)


# ---------------------------------------------------------------- processes


def processes(
    args: argparse.Namespace, device: str
) -> tuple[dict[str, Any], str]:
    """Wrapped iterations in so many processes, each with its own batch."""
    available = torch.cuda.device_count()
    if device == 'cuda' and max(args.processes) > available:
        raise SystemExit(
            f'error: {max(args.processes)} processes need as many GPUs, '
            f'{available} there.'
        )
    args.objects = args.objects[0]
    rows = [
        '| processes | plain s | range | distilled s | range | '
        'distilled / plain | range |',
        '|---|---|---|---|---|---|---|',
    ]
    result = {}
    for number in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(
                one_process, (number, args, device, folder), number
            )
            times = torch.load(Path(folder) / 'times')
        found = [
            d / p
            for p, d in zip(times['plain'], times['distilled'], strict=True)
        ]
        result[number] = {'seconds': times, 'ratios': found}
        rows.append(
            f'| {number} | {spread(times["plain"])} | '
            f'{spread(times["distilled"])} | '
            f'**{statistics.median(found):.3f}** | '
            f'{min(found):.3f}-{max(found):.3f} |'
        )
        print(rows[-1], flush=True)
    return {'processes': result}, '\n'.join(rows)


def one_process(
    rank: int, number: int, args: argparse.Namespace, device: str, folder: str
) -> None:
    """What each process does; the first one writes its times."""
    torch.set_num_threads(args.threads)
    if device == 'cuda':
        torch.cuda.set_device(rank)
    torch_dist.init_process_group(
        'nccl' if device == 'cuda' else 'gloo',
        init_method=f'file://{folder}/store',
        rank=rank,
        world_size=number,
    )
    times = wrapped_times(args, device)
    if rank == 0:
        torch.save(dict(times), Path(folder) / 'times')
    torch_dist.barrier()
    torch_dist.destroy_process_group()


def wrapped_times(args: argparse.Namespace, device: str) -> Times:
    """Of a plain and a distilled student, wrapped as MMEngine wraps them."""
    _, student, batch = build_student(args, device)
    distiller, _ = build(args, device)
    teacher_of(distiller)
    plain = Trainer(student, batch)
    distilled = Trainer(distiller.student, batch, distiller)
    distiller.attach()
    runs: dict[str, Callable[[], None]] = {}
    for name, each in {'plain': plain, 'distilled': distilled}.items():
        each.model = MMDistributedDataParallel(
            module=each.student, broadcast_buffers=False
        )
        runs[name] = each.step
    return interleaved(runs, args, device)
