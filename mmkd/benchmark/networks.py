"""Networks that train together, against each of them training alone."""

import argparse
import copy
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from mmkd.core.distiller import Distiller
from mmkd.errors import ConfigError
from mmkd.peers.peer import TRAINED_TEACHER

from .common import (
    Images,
    Trainer,
    build_together,
    interleaved,
    load_config,
    size_of,
    spread,
)

SEVERAL = 'mmkd.OneTeacherSeveralStudents'
METHODS = ('mmkd.DML', 'mmkd.MutualLearning', SEVERAL)
"""Of any number of students; the others' networks are the config's."""
TOGETHER = 'together'
FROZEN = 'frozen teacher'
Times = Mapping[str, list[float]]


def networks(
    args: argparse.Namespace, device: str
) -> tuple[dict[str, Any], str]:
    """K students together, against the sum of what each costs alone."""
    args.objects = args.objects[0]
    built = {
        number: build_together(cfg, args, device)
        for number, cfg in configs_of(args).items()
    }
    runs = {
        f'{number} {name}': run
        for number, each in built.items()
        for name, run in parts(*each).items()
    }
    times = interleaved(runs, args, device)
    sizes = {number: memory(*each) for number, each in built.items()}
    rows = [
        '| students | alone, sum s | range | together s | range '
        '| together / sum | range | activations, sum MiB | together |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    ratios = {}
    for number in built:
        own = of_number(times, number)
        alone, ratios[number] = against_sum(own)
        rows.append(
            f'| {number} | {spread(alone)} | {spread(own[TOGETHER])} | '
            f'**{statistics.median(ratios[number]):.3f}** | '
            f'{min(ratios[number]):.3f}-{max(ratios[number]):.3f} | '
            f'{kept_alone(sizes[number]):.1f} | '
            f'{sizes[number][TOGETHER]["activations"]:.1f} |'
        )
    rows += ['', *each_network(sizes[number], own)]
    result = {'seconds': times, 'mib': sizes, 'ratios': ratios}
    return result, '\n'.join(rows)


def of_number(times: Times, number: int) -> dict[str, list[float]]:
    """Those of the runs of so many students, by the runs' names."""
    return {
        name.partition(' ')[2]: values
        for name, values in times.items()
        if name.partition(' ')[0] == str(number)
    }


def against_sum(own: Times) -> tuple[list[float], list[float]]:
    """What the parts take alone, and all together to that, by round."""
    parts = (values for name, values in own.items() if name != TOGETHER)
    alone = [sum(each) for each in zip(*parts, strict=True)]
    return alone, [t / a for t, a in zip(own[TOGETHER], alone, strict=True)]


def kept_alone(sizes: Mapping[str, Mapping[str, float]]) -> float:
    return sum(
        each['activations'] for name, each in sizes.items() if name != TOGETHER
    )


# ------------------------------------------------------------------ students


def configs_of(args: argparse.Namespace) -> dict[int, Config]:
    """The configs to measure, by their number of students."""
    cfg = load_config(args)
    distillation = cfg.get('distillation') or {}
    peers, methods = distillation.get('peers'), distillation.get('methods')
    if not peers:
        raise ConfigError(
            '--networks takes a config with distillation.peers, '
            f'{args.config} has none.'
        )
    types = [method.type for method in (methods or {}).values()]
    if args.networks and len(types) == 1 and types[0] in METHODS:
        return {n: with_students(load_config(args), n) for n in args.networks}
    return {1 + len(students_of(peers)): cfg}


def students_of(peers: Mapping[str, Any]) -> list[str]:
    return [name for name in peers if name != TRAINED_TEACHER]


def with_students(cfg: Config, number: int) -> Config:
    """As many students: its first peer, as often as it takes."""
    ((key, method),) = cfg.distillation.methods.items()
    peers = cfg.distillation.peers
    students = students_of(peers)
    if number > 1 and not students:
        raise ConfigError(
            'no peer is a student: --networks copies the first one, and takes '
            'only 1 with this config.'
        )
    # MMEngine's containers: a plain assignment replaces them.
    chosen = {n: p for n, p in peers.items() if n == TRAINED_TEACHER}
    for index in range(2, number + 1):
        chosen[f'student{index}'] = copy.deepcopy(peers[students[0]])
    cfg.distillation.peers = chosen
    if number == 1 and not chosen and cfg.distillation.get('teacher'):
        # What the method is with one student.
        kd = dict(type='mmkd.KD', temperature=method.get('temperature', 1.0))
        cfg.distillation.methods = {key: kd}
    elif number == 1 and method.type == SEVERAL:
        method.beta = 0.0
    elif number == 1:
        raise ConfigError(
            'one network has nobody to learn from: --networks takes numbers '
            'from 2 with this config.'
        )
    return cfg


# --------------------------------------------------------------------- costs


def parts(
    distiller: Distiller, batch: Images
) -> dict[str, Callable[[], None]]:
    """One iteration of each network alone, and of all together."""
    together = Trainer(distiller.student, batch, distiller)
    runs = {
        name: Trainer(model, batch).plain
        for name, model in trained(distiller).items()
    }
    if distiller.teacher.each():
        together.see_teacher()
        runs[FROZEN] = together.teacher
    return {**runs, TOGETHER: together.distilled}


def trained(distiller: Distiller) -> dict[str, nn.Module]:
    peers = {name: peer.model for name, peer in distiller.peers.items()}
    return {'student': distiller.student, **peers}


def memory(distiller: Distiller, batch: Images) -> dict[str, dict[str, float]]:
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
    return {**found, TOGETHER: {'activations': kept}}


def kept_for_backward(model: Any, batch: Images) -> float:
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
    sizes: Mapping[str, Mapping[str, float]], own: Times
) -> list[str]:
    """A row for each network: its memory, and its time alone."""
    rows = [
        '| network | parameters | weights MiB | gradients, momentum MiB '
        '| activations MiB | alone s | range |',
        '|---|---|---|---|---|---|---|',
    ]
    for name, size in sizes.items():
        if name != TOGETHER:
            seconds = own[name] if name in own else own[FROZEN]
            rows.append(
                f'| {name} | {size["parameters"]:.0f} | '
                f'{size["weights"]:.1f} | {size["state"]:.1f} | '
                f'{size["activations"]:.1f} | {spread(seconds)} |'
            )
    return rows
