"""Networks that train together, against each of them training alone."""

import argparse
import copy
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from mmkd.core.distiller import Distiller
from mmkd.errors import ConfigError
from mmkd.peers.peer import TRAINED_TEACHER

from .common import (
    Images,
    Ratios,
    Runs,
    Times,
    Trainer,
    build,
    load_config,
    size_of,
    table,
)

SEVERAL = 'mmkd.OneTeacherSeveralStudents'
METHODS = ('mmkd.DML', 'mmkd.MutualLearning', SEVERAL)
"""Methods for any number of students."""
TOGETHER = 'together'
FROZEN = 'frozen teacher'


def measure_networks(args: argparse.Namespace) -> dict[str, Any]:
    """Time K students together, and each of them alone."""
    built = {
        number: build(args, cfg) for number, cfg in configs_of(args).items()
    }
    runs = {
        f'{number} {name}': run
        for number, each in built.items()
        for name, run in parts(*each).items()
    }
    times = Times.interleaved(runs, args)
    return {
        'seconds': times,
        'mib': {number: memory(*each) for number, each in built.items()},
        'ratios': {n: together_by_sum(of_number(times, n)) for n in built},
    }


def networks_table(result: Mapping[str, Any]) -> str:
    rows = []
    for number, sizes in result['mib'].items():
        own = of_number(result['seconds'], number)
        *alone, together = own.values()
        *kept, kept_together = (s['activations'] for s in sizes.values())
        sums = [sum(each) for each in zip(*alone, strict=True)]
        rows.append([number, sums, together, together_by_sum(own)])
        rows[-1] += [f'{sum(kept):.1f}', f'{kept_together:.1f}']
    header = ['students', 'alone, sum s', 'together s', 'together / sum']
    header += ['activations, sum MiB', 'together']
    return f'{table(header, rows)}\n\n{each_network(sizes, own)}'


def each_network(
    sizes: Mapping[str, Mapping[str, float]], times: Times
) -> str:
    """Show the memory of each network, and its time alone."""
    header = ['network', 'parameters', 'weights MiB']
    header += ['gradients, momentum MiB', 'activations MiB', 'alone s']
    rows = [
        [
            name,
            size['parameters'],
            *(f'{size[k]:.1f}' for k in ('weights', 'state', 'activations')),
            times[name if name in times else FROZEN],
        ]
        for name, size in sizes.items()
        if name != TOGETHER
    ]
    return table(header, rows)


def of_number(times: Times, number: int) -> Times:
    """Return the times of the runs of so many students, by their names."""
    start = f'{number} '
    return Times(
        (name.removeprefix(start), values)
        for name, values in times.items()
        if name.startswith(start)
    )


def together_by_sum(times: Times) -> Ratios:
    return times.ratios(TOGETHER, *(n for n in times if n != TOGETHER))


# ------------------------------------------------------------------ students


def configs_of(args: argparse.Namespace) -> dict[int, Config]:
    """Return the configs to measure, by their number of students."""
    cfg = load_config(args)
    distillation = cfg.get('distillation') or {}
    peers, methods = distillation.get('peers'), distillation.get('methods')
    if not peers:
        raise ConfigError(
            '--networks takes a config with distillation.peers, but '
            f'{args.config} has none.'
        )
    types = [method.type for method in (methods or {}).values()]
    if args.networks and len(types) == 1 and types[0] in METHODS:
        return {n: with_students(load_config(args), n) for n in args.networks}
    return {1 + len(students_of(peers)): cfg}


def students_of(peers: Mapping[str, Any]) -> list[str]:
    return [name for name in peers if name != TRAINED_TEACHER]


def with_students(cfg: Config, number: int) -> Config:
    """Return the config with so many students, copies of its first peer."""
    ((key, method),) = cfg.distillation.methods.items()
    peers = cfg.distillation.peers
    students = students_of(peers)
    if number > 1 and not students:
        raise ConfigError(
            'no peer of the config is a student, and --networks copies the '
            'first one that is. Give --networks 1 with this config.'
        )
    # MMEngine merges into its containers, but an assignment replaces them.
    chosen = {n: p for n, p in peers.items() if n == TRAINED_TEACHER}
    for index in range(2, number + 1):
        chosen[f'student{index}'] = copy.deepcopy(peers[students[0]])
    cfg.distillation.peers = chosen
    if number == 1 and not chosen and cfg.distillation.get('teacher'):
        # The method of one student and one teacher.
        kd = dict(type='mmkd.KD', temperature=method.get('temperature', 1.0))
        cfg.distillation.methods = {key: kd}
    elif number == 1 and method.type == SEVERAL:
        method.beta = 0.0
    elif number == 1:
        raise ConfigError(
            'one network has no other to learn from. Give --networks numbers '
            'from 2 with this config.'
        )
    return cfg


# --------------------------------------------------------------------- costs


def parts(distiller: Distiller, images: Images) -> Runs:
    """Return one iteration of each network alone, and one of all together."""
    together = Trainer(distiller.student, images, distiller)
    runs: Runs = {
        name: Trainer(model, images).plain
        for name, model in trained(distiller).items()
    }
    if distiller.teacher.each():
        together.see_teacher()
        runs[FROZEN] = together.teacher
    return {**runs, TOGETHER: together.distilled}


def trained(distiller: Distiller) -> dict[str, nn.Module]:
    peers = {name: peer.model for name, peer in distiller.peers.items()}
    return {'student': distiller.student, **peers}


def memory(
    distiller: Distiller, images: Images
) -> dict[str, dict[str, float]]:
    """Measure the MiB of weights, training state and activations.

    The state is a gradient and SGD's momentum for each trained weight.
    Activations are what a forward pass keeps for the backward pass, without
    the images; on a GPU the peak is higher by what its kernels need in
    between.
    """
    learning = trained(distiller)
    frozen = {name: t.model for name, t in distiller.networks.items()}
    found: dict[str, dict[str, float]] = {}
    for name, model in {**learning, **frozen}.items():
        learned = [p for p in model.parameters() if p.requires_grad]
        found[name] = {
            'parameters': sum(p.numel() for p in model.parameters()),
            'weights': size_of([model]),
            'state': 2 * sum(p.numel() * 4 for p in learned) / 2**20,
            'activations': 0.0,
        }
        if name in learning:
            found[name]['activations'] = kept_for_backward(model, images)
    distiller.attach()
    try:
        kept = kept_for_backward(distiller.student, images)
    finally:
        distiller.detach()
    return {**found, TOGETHER: {'activations': kept}}


def kept_for_backward(model: Any, images: Images) -> float:
    """Measure the MiB that a forward pass of the losses keeps."""
    weights = model.state_dict().values()
    known = {tensor.untyped_storage().data_ptr() for tensor in weights}
    known.add(images[0].untyped_storage().data_ptr())
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # alive: no address twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        losses = model.loss(*images)
    del losses
    return sum(s.nbytes() for s in kept.values()) / 2**20
