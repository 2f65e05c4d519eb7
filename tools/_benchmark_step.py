"""One training iteration: plain, the teacher's part, distilled."""

import argparse
import copy
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from _benchmark import Trainer, build, build_student, interleaved, size_of
from _training import peak_resident

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
    """The overhead of each config's methods beyond the teacher's forward."""
    rows = [
        '| config | plain s | teacher s | distilled s | overhead / plain | '
        'range | plain MiB | teacher and adapters MiB | more MiB |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    results = {}
    for config in args.configs:
        each = argparse.Namespace(**{**vars(args), 'config': config})
        result = {**ratios(each, device), 'memory_mib': memory(each, device)}
        results[Path(config).stem] = result
        median = {
            kind: statistics.median(times)
            for kind, times in result['all_seconds'].items()
        }
        shares, peak = result['all_overheads'], result['memory_mib']
        rows.append(
            f'| {Path(config).stem} | {median["plain"]:.3f} | '
            f'{median["teacher"]:.3f} | {median["distilled"]:.3f} | '
            f'{statistics.median(shares):+.1%} | '
            f'{min(shares):+.1%} to {max(shares):+.1%} | '
            f'{peak["plain"]:.0f} | '
            f'{peak["teacher_weights"] + peak["adapters"]:.0f} | '
            f'{peak["other"]:.0f} |'
        )
        print(rows[-1], flush=True)
    return {'methods': results}, '\n'.join(rows)


def ratios(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Interleaved times and what follows from them, round by round."""
    distiller, batch = build(args, device)
    trainer = Trainer(distiller.student, batch, distiller)
    trainer.see_teacher()
    runs = {kind: getattr(trainer, kind) for kind in KINDS}
    times = interleaved(runs, device, args.repeat)
    rounds = list(zip(*times.values(), strict=True))
    ratio = [d / (p + t) for p, t, d in rounds]
    return {
        'seconds': {k: statistics.median(v) for k, v in times.items()},
        'all_seconds': times,
        'ratio': statistics.median(ratio),
        'all_ratios': ratio,
        'all_overheads': [(d - p - t) / p for p, t, d in rounds],
    }


def memory(args: argparse.Namespace, device: str) -> dict[str, float]:
    """Peak memory in MiB, and what explains it."""
    distiller, _ = build(args, device)
    weights = size_of([t.model for t in distiller.networks.values()])
    adapters = size_of([distiller])
    del distiller
    plain, distilled = (
        peak_memory(args, kind) for kind in ('plain', 'distilled')
    )
    return {
        'plain': plain,
        'distilled': distilled,
        'teacher_weights': weights,
        'adapters': adapters,
        'other': distilled - plain - weights - adapters,
    }


def peak_memory(args: argparse.Namespace, kind: str) -> float:
    """Peak memory in MiB of a fresh process that runs three iterations."""
    configs = getattr(args, 'configs', [args.config])
    options = [word for word in sys.argv[2:] if word not in configs]
    command = [sys.executable, sys.argv[0], 'step', args.config, *options]
    command += ['--memory-of', kind]
    output = subprocess.run(
        command, check=True, capture_output=True, text=True
    ).stdout
    return float(output.split('PEAK')[1])


def print_peak(args: argparse.Namespace, device: str) -> None:
    """What :func:`peak_memory` starts."""
    if args.memory_of == 'plain':
        _, student, batch = build_student(copy.copy(args), device)
        trainer = Trainer(student, batch)
    else:
        distiller, batch = build(args, device)
        trainer = Trainer(distiller.student, batch, distiller)
    for _ in range(3):
        getattr(trainer, args.memory_of)()
    if device == 'cuda':
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = peak_resident()
    print(f'PEAK{peak}')
