"""What distillation costs: time and memory of a training step.

Example:
    python tools/benchmark.py step configs/faster_rcnn_kd_r50.py --batch 1

Three things are timed in turn, again and again, in one process, so that a
busy machine slows all of them alike: the plain student's iteration (forward,
backward, optimiser), the teacher's forward under ``no_grad`` (just what the
methods read), and the distilled iteration. Peak memory is read in a fresh
process for each of the two iterations.
"""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmdet
import mmengine
import torch
from _training import peak_resident
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor, nn

import mmkd
from mmkd.distiller import Distiller, build_distiller
from mmkd.outputs import Outputs
from mmkd.teacher import class_names

Batch = tuple[Tensor, list[DetDataSample]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest='command', required=True)
    step = commands.add_parser('step', help='one training iteration')
    step.add_argument('config', help='config with `distillation`')
    step.add_argument(
        '--size', type=int, nargs=2, default=(800, 1333), metavar=('H', 'W')
    )
    step.add_argument('--batch', type=int, default=2, help='images')
    step.add_argument('--objects', type=int, default=8, help='per image')
    step.add_argument('--repeat', type=int, default=7, help='measured rounds')
    step.add_argument('--threads', type=int, default=1, help='CPU threads')
    step.add_argument('--device', default='auto', help='cpu, cuda or auto')
    step.add_argument('--json', type=Path, help='write the result there too')
    step.add_argument('--cfg-options', nargs='+', action=DictAction)
    # A fresh process that prints its peak memory: (plain | distilled).
    step.add_argument('--memory-of', help=argparse.SUPPRESS)
    return parser.parse_args()


def make_batch(args: argparse.Namespace, classes: int, device: str) -> Batch:
    """Images of noise with random boxes; both are the same every time."""
    generator = torch.Generator().manual_seed(0)
    height, width = args.size
    padded = tuple(-(-side // 32) * 32 for side in args.size)
    images = torch.zeros(args.batch, 3, *padded)
    images[..., :height, :width] = torch.randn(
        args.batch, 3, height, width, generator=generator
    )
    samples = []
    for _ in range(args.batch):
        corner = torch.rand(args.objects, 2, generator=generator) * 0.7
        extent = torch.rand(args.objects, 2, generator=generator) * 0.25
        scale = torch.tensor([width, height])
        boxes = torch.cat([corner, corner + extent + 0.02], 1)
        sample = DetDataSample(
            metainfo=dict(
                img_shape=tuple(args.size),
                ori_shape=tuple(args.size),
                pad_shape=padded,
                batch_input_shape=padded,
                scale_factor=(1.0, 1.0),
            )
        )
        sample.gt_instances = InstanceData(
            bboxes=boxes * scale.repeat(2),
            labels=torch.randint(
                classes, (args.objects,), generator=generator
            ),
        )
        sample.ignored_instances = InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0).long()
        )
        samples.append(sample.to(device))
    return images.to(device), samples


def build_student(
    args: argparse.Namespace, device: str
) -> tuple[Config, nn.Module, Batch]:
    """The config, its student and a batch."""
    register_all_modules()
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    torch.manual_seed(0)
    model_cfg = copy.deepcopy(cfg.model)
    model_cfg.backbone.init_cfg = None  # speed does not depend on weights
    student = MODELS.build(model_cfg)
    student.init_weights()
    student.to(device).train()
    classes = class_names({}, cfg) or ()
    return cfg, student, make_batch(args, len(classes), device)


def build(args: argparse.Namespace, device: str) -> tuple[Distiller, Batch]:
    """The student with its distiller (not attached) and a batch."""
    cfg, student, batch = build_student(args, device)
    distillation = copy.deepcopy(cfg.distillation)
    distillation.teacher.checkpoint = None
    classes = class_names({}, cfg) or ()
    return build_distiller(distillation, student, classes), batch


class Trainer:
    """Iterations of a student with SGD, plain or distilled."""

    def __init__(
        self, student: nn.Module, distiller: Distiller | None, batch: Batch
    ) -> None:
        self.student, self.distiller = student, distiller
        self.inputs, self.samples = batch
        adapters = distiller.parameters() if distiller else ()
        self.optimizer = torch.optim.SGD(
            [*student.parameters(), *adapters],
            lr=1e-6,
            momentum=0.9,
        )

    def step(self) -> None:
        """One iteration; distilled if the distiller is attached."""
        losses = self.student.loss(self.inputs, self.samples)
        total, _ = self.student.parse_losses(losses)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()

    def plain(self) -> None:
        """The stock student's iteration."""
        self.step()

    def distilled(self) -> None:
        """The same with every method of the config."""
        assert self.distiller
        self.distiller.attach()
        try:
            self.step()
        finally:
            self.distiller.detach()

    def teacher(self) -> None:
        """The teacher's part alone, on the student's last sampled boxes."""
        assert self.distiller
        view = self.distiller.teacher(self.inputs, self.samples)
        _ = view.maps
        methods = self.distiller.methods.values()
        if any(getattr(m, 'rpn', False) for m in methods):
            _ = view.rpn
        if any(getattr(m, 'rcn', False) for m in methods):
            for stage, sample in enumerate(self.sampled.rois):
                view.score_rois(sample, stage)

    def record_samples(self) -> None:
        """Keep one step's sampled RoIs for :meth:`teacher`."""
        with torch.no_grad(), Outputs(self.student).recording() as outputs:
            self.student.loss(self.inputs, self.samples)
        self.sampled = outputs


def timed(run: Callable[[], None], device: str) -> float:
    """Seconds of one call, kernels on a GPU included."""
    if device == 'cuda':
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(args: argparse.Namespace, kind: str) -> float:
    """Peak memory in MiB of a fresh process that runs three iterations."""
    command = [sys.executable, *sys.argv, '--memory-of', kind]
    output = subprocess.run(
        command, check=True, capture_output=True, text=True
    ).stdout
    return float(output.split('PEAK')[1])


def print_peak(args: argparse.Namespace, device: str) -> None:
    """What :func:`peak_memory` starts."""
    if args.memory_of == 'plain':
        _, student, batch = build_student(args, device)
        trainer = Trainer(student, None, batch)
    else:
        distiller, batch = build(args, device)
        trainer = Trainer(distiller.student, distiller, batch)
    for _ in range(3):
        getattr(trainer, args.memory_of)()
    if device == 'cuda':
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = peak_resident()
    print(f'PEAK{peak}')


def size_of(modules: list[nn.Module]) -> float:
    """MiB of the modules' parameters and buffers."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def measure(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Interleaved times, their medians and the ratio."""
    distiller, batch = build(args, device)
    trainer = Trainer(distiller.student, distiller, batch)
    trainer.record_samples()
    kinds = ('plain', 'teacher', 'distilled')
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for round_number in range(args.repeat + 1):
        for kind in kinds:
            seconds = timed(getattr(trainer, kind), device)
            if round_number:  # the first round warms up
                times[kind].append(seconds)
    ratios = [
        d / (p + t)
        for p, t, d in zip(*(times[kind] for kind in kinds), strict=True)
    ]
    weights = size_of([distiller.teacher.model])
    adapters = size_of([distiller])
    plain, distilled = (
        peak_memory(args, kind) for kind in ('plain', 'distilled')
    )
    return {
        'seconds': {k: statistics.median(v) for k, v in times.items()},
        'all_seconds': times,
        'ratio': statistics.median(ratios),
        'all_ratios': ratios,
        'memory_mib': {
            'plain': plain,
            'distilled': distilled,
            'teacher_weights': weights,
            'adapters': adapters,
            'other': distilled - plain - weights - adapters,
        },
    }


def environment(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    commit = subprocess.run(
        ['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True
    ).stdout.strip()
    name = platform.processor() or platform.machine()
    return {
        'config': args.config,
        'size': list(args.size),
        'batch': args.batch,
        'threads': args.threads,
        'device': torch.cuda.get_device_name() if device == 'cuda' else name,
        'python': platform.python_version(),
        'torch': torch.__version__,
        'mmengine': mmengine.__version__,
        'mmdet': mmdet.__version__,
        'mmkd': mmkd.__version__,
        'commit': commit or None,
    }


def report(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    seconds, memory = result['seconds'], result['memory_mib']
    rows = [
        '| | median s | range |',
        '|---|---|---|',
    ]
    names = {
        'plain': 'plain student iteration',
        'teacher': 'teacher forward, no_grad',
        'distilled': 'distilled iteration',
    }
    for kind, name in names.items():
        values = result['all_seconds'][kind]
        rows.append(
            f'| {name} | {seconds[kind]:.3f} | '
            f'{min(values):.3f}-{max(values):.3f} |'
        )
    ratios = result['all_ratios']
    rows.append(
        f'| distilled / (plain + teacher) | **{result["ratio"]:.3f}** | '
        f'{min(ratios):.3f}-{max(ratios):.3f} |'
    )
    share = memory['other'] / memory['plain']
    rows.append(
        f'\nPeak memory: plain {memory["plain"]:.0f} MiB, distilled '
        f'{memory["distilled"]:.0f} MiB = plain + teacher weights '
        f'{memory["teacher_weights"]:.0f} + adapters '
        f'{memory["adapters"]:.0f} + other {memory["other"]:.0f} '
        f'({share:+.1%} of plain)'
    )
    return '\n'.join(rows)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    device = args.device
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if args.memory_of:
        print_peak(args, device)
        return
    result = {**environment(args, device), **measure(args, device)}
    print(report(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == '__main__':
    main()
