"""One training iteration: plain, the teacher's part, distilled."""

import argparse
import copy
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmkd.core.distiller import Distiller
from mmkd.core.method import Method
from mmkd.data.batch import Batch
from mmkd.detectors.record import StepRecord
from mmkd.doctor.conditions import mapped
from mmkd.errors import ConfigError
from mmkd.study.step import peak_resident

from .common import (
    CONFIG,
    OBJECTS,
    Benchmark,
    Times,
    Trainer,
    altered,
    each,
    in_processes,
    load_config,
    size_of,
    table,
    teacher_of,
)
from .references import REFERENCES

KINDS = {
    'plain': 'plain student iteration',
    'teacher': 'teacher forward, no_grad',
    'distilled': 'distilled iteration',
}

# ---------------------------------------------------------------------- step


def measure_step(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one training iteration and its parts, time and memory.

    These are the plain student's iteration (forward, backward, optimiser),
    the teacher's forward under no_grad (only what the methods read), and the
    distilled iteration. Each peak of memory is that of a fresh process.
    """
    trainer = Trainer.of(args)
    sizes, times = sizes_of(trainer.distiller), parts_of(trainer, args)
    del trainer
    found = times.ratios('distilled', 'plain', 'teacher')
    return {
        'seconds': {k: statistics.median(v) for k, v in times.items()},
        'all_seconds': times,
        'ratio': statistics.median(found),
        'all_ratios': found,
        'memory_mib': memory(args, sizes),
    }


def step_table(result: Mapping[str, Any]) -> str:
    rows = [[name, result['all_seconds'][k]] for k, name in KINDS.items()]
    rows.append(['distilled / (plain + teacher)', result['all_ratios']])
    peak = result['memory_mib']
    return (
        f'{table(["", "median s"], rows)}\n\n'
        f'Peak memory: plain {peak["plain"]:.0f} MiB, distilled '
        f'{peak["distilled"]:.0f} MiB = plain + teacher weights '
        f'{peak["teacher_weights"]:.0f} + adapters {peak["adapters"]:.0f} + '
        f'other {peak["other"]:.0f} ({peak["other"] / peak["plain"]:+.1%} of '
        'plain)'
    )


def parts_of(trainer: Trainer, args: argparse.Namespace) -> Times:
    """Time the iterations and the teacher's part of them."""
    trainer.see_teacher()
    runs = {kind: getattr(trainer, kind) for kind in KINDS}
    return Times.interleaved(runs, args)


# ------------------------------------------------------------------- methods


def measure_methods(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the methods of each config add to both networks.

    This is no difference of whole iterations, in which a few per cent would
    drown: the losses, and their gradients in what they read of the student,
    are computed from the recorded outputs of one step, as a share of the
    plain iteration, which runs in turn with them. The plain memory of a
    student that several configs share is measured once.

    With --references they run in turn with plain forms of the same losses
    (mmkd/benchmark/references.py), on the same feature maps. The last column
    is how far the losses and all gradients are apart where nothing is padded,
    because the plain forms count padding as image.
    """
    if args.references:
        found = each(args.configs, partial(against_reference, args), plain_row)
        return {'references': {Path(k).stem: v for k, v in found.items()}}
    peaks: dict[str, float] = {}

    def measure(config: str) -> dict[str, Any]:
        own = altered(args, config=config)
        student = json.dumps(load_config(own).model.to_dict(), default=repr)
        times, sizes = method_times(own)
        found = times.ratios('methods', 'plain')
        memory_mib = memory(own, sizes, peaks.get(student))
        peaks[student] = memory_mib['plain']
        return {
            'plain_seconds': statistics.median(times['plain']),
            'all_seconds': times,
            'share': statistics.median(found),
            'all_shares': found,
            'memory_mib': memory_mib,
        }

    found = each(args.configs, measure, method_row)
    return {'methods': {Path(k).stem: v for k, v in found.items()}}


def methods_table(result: Mapping[str, Any]) -> str:
    if 'references' in result:
        header = ['config', 'mmkd s', 'plain form s', 'mmkd / plain form']
        rows = [plain_row(*found) for found in result['references'].items()]
        return table([*header, 'losses differ by', 'gradients'], rows)
    header = ['config', 'plain s', 'methods s', 'methods / plain', 'range']
    header += ['plain MiB', 'teacher and adapters MiB', 'more MiB']
    rows = [method_row(*found) for found in result['methods'].items()]
    return table(header, rows)


def method_row(config: str, result: Mapping[str, Any]) -> list[Any]:
    share, memory = result['all_shares'], result['memory_mib']
    return [
        Path(config).stem,
        result['plain_seconds'],
        result['all_seconds']['methods'],
        f'**{result["share"]:.1%}**',
        f'{min(share):.1%}-{max(share):.1%}',
        f'{memory["plain"]:.0f}',
        f'{memory["teacher_weights"] + memory["adapters"]:.0f}',
        f'{memory["other"]:.0f}',
    ]


def plain_row(config: str, result: Mapping[str, Any]) -> list[Any]:
    own, plain = result['all_seconds'].values()
    differs = (f'{value:.0e}' for value in result['differs'].values())
    return [Path(config).stem, own, plain, result['all_ratios'], *differs]


def method_times(args: argparse.Namespace) -> tuple[Times, dict[str, float]]:
    """Time one config's methods; return the sizes of its networks, too."""
    trainer = Trainer.of(args)
    alone = MethodsAlone(trainer)
    runs = {'methods': alone.losses, 'plain': trainer.plain}
    return Times.interleaved(runs, args), sizes_of(trainer.distiller)


def against_reference(args: argparse.Namespace, config: str) -> dict[str, Any]:
    """Time one config's methods and their plain forms; compare the results."""
    alone = MethodsAlone(Trainer.of(altered(args, config=config)))
    alone.check_references()
    batch, alone.batch = alone.batch, without_padding(alone.batch)
    loss, gradients = alone.losses(), alone.gradients()
    plain_loss, plain_gradients = alone.references(), alone.gradients()
    alone.batch = batch
    runs = {'mmkd': alone.losses, 'plain form': alone.references}
    times = Times.interleaved(runs, args)
    found = times.ratios('mmkd', 'plain form')
    return {
        'all_seconds': times,
        'ratio': statistics.median(found),
        'all_ratios': found,
        'differs': {
            'loss': relative_distance(loss, plain_loss),
            'gradients': relative_distance(gradients, plain_gradients),
        },
    }


class MethodsAlone:
    """Repeats a step's losses and their gradients, from recorded outputs.

    Raises:
        ConfigError: If a method computes no loss.
    """

    def __init__(self, trainer: Trainer) -> None:
        distiller, self.batch = trainer.distiller, trainer.batch
        assert distiller
        self.active = distiller.active_methods()
        for name, (method, _) in self.active.items():
            if type(method).forward is Method.forward:
                raise ConfigError(
                    f'{name} ({type(method).__name__}) computes no loss, it '
                    "steers the student's own. Measure it with `step` or "
                    '`assign`.'
                )
        self.student = distiller._record()
        self.teacher = teacher_of(distiller).view(self.batch)
        with self.student.recording():
            type(distiller.student).loss(
                distiller.student, self.batch.inputs, self.batch.copies()
            )
        self.leaves = [*cut_off(self.student), *distiller.parameters()]

    def losses(self) -> torch.Tensor:
        """Return the sum of the methods' losses; compute its gradients."""
        return self._run(
            lambda method: method.forward(
                self.student, self.teacher, self.batch
            ).values()
        )

    def references(self) -> torch.Tensor:
        """Do the same with the methods' plain forms."""

        def plain(method: Any) -> list[torch.Tensor]:
            pairs = method.pairs(self.student, self.teacher)
            return [
                REFERENCES[type(method).__name__](method, pairs, self.batch)
            ]

        return self._run(plain)

    def check_references(self) -> None:
        """Raise ``ConfigError`` if a method has no plain form."""
        for name, (method, _) in self.active.items():
            if type(method).__name__ not in REFERENCES:
                raise ConfigError(
                    f'--references: {name} ({type(method).__name__}) has no '
                    f'plain form to compare with; {", ".join(REFERENCES)} '
                    'have one. Leave --references out, or the config.'
                )

    def gradients(self) -> torch.Tensor:
        """Return the gradients of the last call, all in one vector."""
        found = [t.grad.flatten() for t in self.leaves if t.grad is not None]
        return torch.cat(found)

    def _run(self, compute: Callable[[Any], Iterable[torch.Tensor]]) -> Any:
        self.student.cache.clear()
        for view in (*self.teacher.each().values(), *self.teacher.parts()):
            view.cache.clear()
        vars(self.student).pop('anchors', None)
        losses = [
            weight * loss
            for method, weight in self.active.values()
            for loss in compute(method)
        ]
        for tensor in self.leaves:
            tensor.grad = None
        total = torch.stack(losses).sum()
        total.backward()
        return total.detach()


def without_padding(batch: Batch) -> Batch:
    """Return a batch whose images reach to its edges."""
    samples = copy.deepcopy(batch.data_samples)
    for sample in samples:
        sample.set_metainfo(dict(img_shape=sample.batch_input_shape))
    return dataclasses.replace(batch, data_samples=samples)


def relative_distance(own: torch.Tensor, other: torch.Tensor) -> float:
    """Return the distance of two vectors as a share of the second's length."""
    return float((own - other).norm() / other.norm())


def cut_off(student: StepRecord) -> list[torch.Tensor]:
    """Cut a record off from its network; return its new leaves."""
    leaves: list[torch.Tensor] = []

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    student._fired = mapped(cut, student._fired)
    for sample in student.rois if student._roi_calls else ():
        sample.logits = mapped(cut, sample.logits)
        sample.deltas = mapped(cut, sample.deltas)
    return leaves


# -------------------------------------------------------------------- memory


def memory(
    args: argparse.Namespace,
    sizes: Mapping[str, float],
    plain: float | None = None,
) -> dict[str, float]:
    """Measure the peak memory in MiB, and what explains it.

    Args:
        args: The arguments of the command.
        sizes: The networks beside the student (see :func:`sizes_of`).
        plain: The student's own peak; None if it is to be measured.
    """
    if plain is None:
        plain = peak_memory(args, 'plain')
    distilled = peak_memory(args, 'distilled')
    other = distilled - plain - sum(sizes.values())
    return {'plain': plain, 'distilled': distilled, **sizes, 'other': other}


def sizes_of(distiller: Distiller | None) -> dict[str, float]:
    """Return the MiB of the teachers' weights and of the adapters."""
    assert distiller
    networks = [teacher.model for teacher in distiller.networks.values()]
    return {
        'teacher_weights': size_of(networks),
        'adapters': size_of([distiller]),
    }


def peak_memory(args: argparse.Namespace, kind: str) -> float:
    """Measure the peak of two iterations in a process of their own."""
    return in_processes(1, own_peak, args, kind)[0]


def own_peak(args: argparse.Namespace, kind: str, rank: int) -> float:
    """Do two iterations; return this process's peak of memory in MiB."""
    torch.set_num_threads(args.threads)
    trainer = Trainer.of(args, distils=kind == 'distilled')
    for _ in range(2):  # the second one with the optimiser's state
        getattr(trainer, kind)()
    if args.device == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_resident()


STEP = Benchmark('step', {**CONFIG, **OBJECTS}, measure_step, step_table)
METHODS = Benchmark(
    'methods',
    {
        'configs': dict(nargs='+', help='configs with `distillation`'),
        '--references': dict(
            action='store_true',
            help='compare with plain forms of the same losses',
        ),
        **OBJECTS,
    },
    measure_methods,
    methods_table,
)
