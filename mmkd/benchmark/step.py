"""One training iteration: plain, the teacher's part, distilled."""

import argparse
import copy
import json
import logging
import multiprocessing
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mmkd.core.distiller import Distiller
from mmkd.core.method import Method
from mmkd.data.batch import Batch
from mmkd.doctor.conditions import mapped
from mmkd.study.step import peak_resident

from .common import (
    Trainer,
    build,
    build_student,
    interleaved,
    load_config,
    size_of,
    spread,
    teacher_of,
)

KINDS = {
    'plain': 'plain student iteration',
    'teacher': 'teacher forward, no_grad',
    'distilled': 'distilled iteration',
}


def step(args: argparse.Namespace, device: str) -> tuple[dict[str, Any], str]:
    """Times, ratio and peak memory of one config."""
    result = {**ratios(args, device), 'memory_mib': memory(args, device)}
    rows = ['| | median s | range |', '|---|---|---|']
    for kind, name in KINDS.items():
        times = result['all_seconds'][kind]
        rows.append(
            f'| {name} | {statistics.median(times):.3f} | '
            f'{min(times):.3f}-{max(times):.3f} |'
        )
    values = result['all_ratios']
    rows.append(
        f'| distilled / (plain + teacher) | **{result["ratio"]:.3f}** | '
        f'{min(values):.3f}-{max(values):.3f} |'
    )
    peak = result['memory_mib']
    rows.append(
        f'\nPeak memory: plain {peak["plain"]:.0f} MiB, distilled '
        f'{peak["distilled"]:.0f} MiB = plain + teacher weights '
        f'{peak["teacher_weights"]:.0f} + adapters {peak["adapters"]:.0f} + '
        f'other {peak["other"]:.0f} ({peak["other"] / peak["plain"]:+.1%} of '
        'plain)'
    )
    return result, '\n'.join(rows)


def methods(
    args: argparse.Namespace, device: str
) -> tuple[dict[str, Any], str]:
    """What each config's methods cost beyond both networks' passes.

    Not as a difference of whole iterations, in which a few per cent drown:
    the losses are computed, and their gradients in what they read of the
    student, from one step's recorded outputs. Each config's plain iteration
    runs in turn with them; the plain memory of a student that several
    configs share is measured once.
    """
    rows = [
        '| config | plain s | methods s | range | methods / plain | range | '
        'plain MiB | teacher and adapters MiB | more MiB |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    results = {}
    peaks: dict[str, float] = {}
    for config in args.configs:
        each = argparse.Namespace(**{**vars(args), 'config': config})
        student = json.dumps(load_config(each).model.to_dict(), default=repr)
        distiller, batch = build(each, device)
        trainer = Trainer(distiller.student, batch, distiller)
        runs = {'methods': methods_alone(trainer), 'plain': trainer.plain}
        result = shares(interleaved(runs, args, device))
        weights, adapters = sizes(distiller)
        del distiller, trainer, runs
        if student not in peaks:
            peaks[student] = peak_memory(each, device, 'plain')
        plain = peaks[student]
        result['memory_mib'] = {
            'plain': plain,
            'teacher_weights': weights,
            'adapters': adapters,
            'other': peak_memory(each, device, 'distilled')
            - plain
            - weights
            - adapters,
        }
        results[Path(config).stem] = result
        rows.append(method_row(Path(config).stem, result))
        print(rows[-1], flush=True)
    return {'methods': results}, '\n'.join(rows)


def shares(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """The methods' part of the plain iteration, round by round."""
    rounds = zip(times['methods'], times['plain'], strict=True)
    found = [own / plain for own, plain in rounds]
    return {
        'plain_seconds': statistics.median(times['plain']),
        'all_seconds': times,
        'share': statistics.median(found),
        'all_shares': found,
    }


def method_row(name: str, result: Mapping[str, Any]) -> str:
    found, memory = result['all_shares'], result['memory_mib']
    return (
        f'| {name} | {result["plain_seconds"]:.3f} | '
        f'{spread(result["all_seconds"]["methods"])} | '
        f'**{result["share"]:.1%}** | {min(found):.1%}-{max(found):.1%} | '
        f'{memory["plain"]:.0f} | '
        f'{memory["teacher_weights"] + memory["adapters"]:.0f} | '
        f'{memory["other"]:.0f} |'
    )


def methods_alone(trainer: Trainer) -> Callable[[], torch.Tensor]:
    """A call that takes a step's losses, and their gradients, once more.

    It returns the losses' sum.
    """
    distiller = trainer.distiller
    batch = Batch(trainer.inputs, trainer.samples)
    assert distiller
    frozen, active = teacher_of(distiller), distiller.active_methods()
    for name, (method, _) in active.items():
        if type(method).forward is Method.forward:
            raise SystemExit(
                f'error: {name} ({type(method).__name__}) computes no loss, '
                "it steers the student's own. Measure it with `step` or "
                '`assign`.'
            )
    student, teacher = distiller._record(), frozen.view(batch)
    with student.recording():
        type(distiller.student).loss(
            distiller.student, batch.inputs, batch.data_samples
        )
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

    def run() -> torch.Tensor:
        student.cache.clear()
        for part in (*teacher.each().values(), *teacher.parts()):
            part.cache.clear()
        vars(student).pop('anchors', None)
        losses = [
            weight * loss
            for method, weight in active.values()
            for loss in method.forward(student, teacher, batch).values()
        ]
        for tensor in (*leaves, *distiller.parameters()):
            tensor.grad = None
        total = torch.stack(losses).sum()
        total.backward()
        return total.detach()

    return run


def ratios(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Interleaved times and what follows from them."""
    distiller, batch = build(args, device)
    trainer = Trainer(distiller.student, batch, distiller)
    trainer.see_teacher()
    runs = {kind: getattr(trainer, kind) for kind in KINDS}
    return against_parts(interleaved(runs, args, device))


def against_parts(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """The distilled iteration against its parts, round by round."""
    rounds = zip(*(times[kind] for kind in KINDS), strict=True)
    ratio = [d / (p + t) for p, t, d in rounds]
    return {
        'seconds': {k: statistics.median(v) for k, v in times.items()},
        'all_seconds': times,
        'ratio': statistics.median(ratio),
        'all_ratios': ratio,
    }


def memory(args: argparse.Namespace, device: str) -> dict[str, float]:
    """Peak memory in MiB, and what explains it."""
    weights, adapters = sizes(build(args, device)[0])
    plain, distilled = (
        peak_memory(args, device, kind) for kind in ('plain', 'distilled')
    )
    return {
        'plain': plain,
        'distilled': distilled,
        'teacher_weights': weights,
        'adapters': adapters,
        'other': distilled - plain - weights - adapters,
    }


def sizes(distiller: Distiller) -> tuple[float, float]:
    """MiB of the teachers' weights and of the adapters."""
    networks = [teacher.model for teacher in distiller.networks.values()]
    return size_of(networks), size_of([distiller])


def peak_memory(args: argparse.Namespace, device: str, kind: str) -> float:
    """Peak memory in MiB of a fresh process that runs two iterations."""
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(own_peak, args, device, kind).result()


def own_peak(args: argparse.Namespace, device: str, kind: str) -> float:
    """What :func:`peak_memory` runs."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    if kind == 'plain':
        _, student, batch = build_student(copy.copy(args), device)
        trainer = Trainer(student, batch)
    else:
        distiller, batch = build(args, device)
        trainer = Trainer(distiller.student, batch, distiller)
    for _ in range(2):  # the second one with the optimiser's state
        getattr(trainer, kind)()
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_resident()
