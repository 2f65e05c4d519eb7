"""Networks that train together, against each of them training alone."""

import argparse
import copy
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from _benchmark import (
    Batch,
    Trainer,
    build_together,
    interleaved,
    load_config,
    size_of,
    spread,
)
from mmengine.config import Config
from torch import nn

from mmkd.distiller import Distiller
from mmkd.utils import ConfigError

METHODS = ('mmkd.MutualLearning', 'mmkd.OneTeacherSeveralStudents')


def networks(
    args: argparse.Namespace, device: str
) -> tuple[dict[str, Any], str]:
    """K students together, against the sum of what each costs alone."""
    args.objects = args.objects[0]
    built = {
        number: build_together(
            with_students(load_config(args), number), args, device
        )
        for number in args.networks
    }
    runs: dict[str, Callable[[], None]] = {}
    for number, (distiller, batch) in built.items():
        for name, run in parts(distiller, batch).items():
            runs[f'{number} {name}'] = run
    times = interleaved(runs, device, args.repeat)
    sizes = {n: memory(*each) for n, each in built.items()}
    rows = [
        '| students | alone, sum s | range | together s | range '
        '| together / sum | range | activations, sum MiB | together |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    result: dict[str, Any] = {'seconds': times, 'mib': sizes, 'ratios': {}}
    for number in args.networks:
        own = {
            name.partition(' ')[2]: values
            for name, values in times.items()
            if name.startswith(f'{number} ')
        }
        together = own.pop('together')
        alone = [sum(each) for each in zip(*own.values(), strict=True)]
        ratios = [t / a for t, a in zip(together, alone, strict=True)]
        result['ratios'][number] = ratios
        kept = {n: each['activations'] for n, each in sizes[number].items()}
        all_kept = kept.pop('together')
        rows.append(
            f'| {number} | {spread(alone)} | {spread(together)} | '
            f'**{statistics.median(ratios):.3f}** | '
            f'{min(ratios):.3f}-{max(ratios):.3f} | '
            f'{sum(kept.values()):.1f} | {all_kept:.1f} |'
        )
    last = args.networks[-1]
    rows += ['', *each_network(sizes[last], times, last)]
    return result, '\n'.join(rows)


def with_students(cfg: Config, number: int) -> Config:
    """As many students: its first peer, as often as it takes."""
    ((key, method),) = cfg.distillation.methods.items()
    if method.type not in METHODS:
        raise ConfigError(
            f'--networks takes a config with one of {METHODS}, got '
            f'{method.type}.'
        )
    peers = cfg.distillation.peers
    teaching = method.get('teacher')
    student = next(peers[name] for name in peers if name != teaching)
    # MMEngine's containers: a plain assignment replaces them.
    chosen = {n: p for n, p in peers.items() if n == teaching}
    for index in range(2, number + 1):
        chosen[f'student{index}'] = copy.deepcopy(student)
    cfg.distillation.peers = chosen
    if number == 1 and not chosen and cfg.distillation.get('teacher'):
        # What the method is with one student.
        kd = dict(type='mmkd.KD', temperature=method.get('temperature', 1.0))
        cfg.distillation.methods = {key: kd}
    elif number == 1 and 'alpha' in method:
        method.beta = 0.0
    elif number == 1:
        raise ConfigError(
            'one network has nobody to learn from: --networks takes numbers '
            'from 2 with this config.'
        )
    return cfg


def parts(distiller: Distiller, batch: Batch) -> dict[str, Callable[[], None]]:
    """One iteration of each network alone, and of all together."""
    together = Trainer(distiller.student, batch, distiller)
    runs = {
        name: Trainer(model, batch).plain
        for name, model in trained(distiller).items()
    }
    if distiller.teacher is not None:
        together.see_teacher()
        runs['frozen teacher'] = together.teacher
    return {**runs, 'together': together.distilled}


def trained(distiller: Distiller) -> dict[str, nn.Module]:
    peers = {name: peer.model for name, peer in distiller.peers.items()}
    return {'student': distiller.student, **peers}


def memory(distiller: Distiller, batch: Batch) -> dict[str, dict[str, float]]:
    """MiB of each network alone: weights, training state, activations.

    The state is a gradient and SGD's momentum for each trained weight.
    Activations are what a forward pass keeps for the backward pass, the
    images left out; with a GPU the peak is higher by what kernels need for a
    moment.
    """
    found: dict[str, dict[str, float]] = {}
    for name, model in trained(distiller).items():
        learned = [p for p in model.parameters() if p.requires_grad]
        found[name] = {
            'parameters': sum(p.numel() for p in model.parameters()),
            'weights': size_of([model]),
            'state': 2 * sum(p.numel() * 4 for p in learned) / 2**20,
            'activations': kept_for_backward(model, batch),
        }
    for name, teacher in distiller.networks.items():
        found[name] = {
            'parameters': sum(p.numel() for p in teacher.model.parameters()),
            'weights': size_of([teacher.model]),
            'state': 0.0,
            'activations': 0.0,
        }
    distiller.attach()
    try:
        kept = kept_for_backward(distiller.student, batch)
    finally:
        distiller.detach()
    return {**found, 'together': {'activations': kept}}


def kept_for_backward(model: Any, batch: Batch) -> float:
    """MiB that a forward pass of the losses keeps."""
    weights = model.state_dict().values()
    known = {tensor.untyped_storage().data_ptr() for tensor in weights}
    known.add(batch[0].untyped_storage().data_ptr())
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # alive: no address twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        losses = model.loss(*batch)
    del losses
    return sum(s.nbytes() for s in kept.values()) / 2**20


def each_network(
    sizes: Mapping[str, Mapping[str, float]],
    times: Mapping[str, list[float]],
    number: int,
) -> list[str]:
    """A row for each network: its memory, and its time alone."""
    rows = [
        '| network | parameters | weights MiB | gradients, momentum MiB '
        '| activations MiB | alone s | range |',
        '|---|---|---|---|---|---|---|',
    ]
    for name, own in sizes.items():
        if name == 'together':
            continue
        key = f'{number} {name}'
        seconds = times.get(key, times.get(f'{number} frozen teacher', []))
        rows.append(
            f'| {name} | {own["parameters"]:.0f} | {own["weights"]:.1f} | '
            f'{own["state"]:.1f} | {own["activations"]:.1f} | '
            f'{spread(seconds)} |'
        )
    return rows
