"""What the benchmarks share: batches, networks, clocks."""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmkd.core.distiller import Distiller, build_distiller
from mmkd.data.batch import Batch
from mmkd.detectors.record import replaced
from mmkd.detectors.source import class_names
from mmkd.detectors.source import load_config as read_config
from mmkd.errors import ConfigError
from mmkd.peers.peer import with_trained_teacher
from mmkd.teachers.build import changed
from mmkd.teachers.view import Teacher

Images = tuple[Tensor, list[DetDataSample]]


def make_batch(args: argparse.Namespace, classes: int, device: str) -> Images:
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
) -> tuple[Config, nn.Module, Images]:
    """The config, its student and a batch."""
    cfg = load_config(args)
    return cfg, *student_of(cfg, args, device)


def load_config(args: argparse.Namespace) -> Config:
    cfg = read_config(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    if cfg.get('distillation'):
        cfg.distillation = with_trained_teacher(cfg.distillation)
    return cfg


def student_of(
    cfg: Config, args: argparse.Namespace, device: str
) -> tuple[nn.Module, Images]:
    """A config's student and a batch."""
    register_all_modules()
    torch.manual_seed(0)
    model_cfg = copy.deepcopy(cfg.model)
    model_cfg.backbone.init_cfg = None  # speed does not depend on weights
    student = MODELS.build(model_cfg)
    student.init_weights()
    student.to(device).train()
    classes = class_names({}, cfg) or ()
    return student, make_batch(args, len(classes), device)


def build(args: argparse.Namespace, device: str) -> tuple[Distiller, Images]:
    """The student with its distiller (not attached) and a batch."""
    return build_together(load_config(args), args, device)


def build_together(
    cfg: Config, args: argparse.Namespace, device: str
) -> tuple[Distiller, Images]:
    """The same of a config that has been read."""
    if not cfg.get('distillation'):
        raise ConfigError(
            f'{args.config} has no distillation to measure. Give a config '
            'that distils, such as mmkd::faster_rcnn_kd_r50.py.'
        )
    student, batch = student_of(cfg, args, device)
    distillation = copy.deepcopy(cfg.distillation)
    if 'teacher' in distillation:
        distillation.teacher = untrained(distillation.teacher)
    for peer in distillation.get('peers', {}).values():
        options = peer.get('cfg_options') or {}
        peer.cfg_options = {**options, 'model.backbone.init_cfg': None}
        peer.checkpoint = None
    classes = class_names({}, cfg) or ()
    return build_distiller(distillation, student, classes), batch


def untrained(teacher: Any) -> Any:
    """Descriptions of teachers without their weights."""
    return changed(teacher, lambda options: {**options, 'checkpoint': None})


class Trainer:
    """Iterations of a student with SGD, plain or distilled."""

    def __init__(
        self,
        student: nn.Module,
        batch: Images,
        distiller: Distiller | None = None,
    ) -> None:
        self.student, self.distiller = student, distiller
        self.model: nn.Module = student
        """What is called: the student, or its wrapper."""
        self.inputs, self.samples = batch
        adapters = distiller.parameters() if distiller else ()
        self.optimizer = torch.optim.SGD(
            [*student.parameters(), *adapters], lr=1e-6, momentum=0.9
        )

    def step(self) -> None:
        """One iteration; distilled if the distiller is attached."""
        losses = self.model(self.inputs, self.samples, mode='loss')
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

    def see_teacher(self) -> None:
        """Find out which of the teacher's outputs a distilled step reads."""
        assert self.distiller
        teacher = teacher_of(self.distiller)
        self.rois: dict[int, Any] = {}
        views: list[Any] = []
        view = teacher.view

        def watched(batch: Batch) -> Any:
            seen = view(batch)
            for part in seen.parts():
                score = part.score_rois

                def score_rois(
                    sample: Any, stage: int, score: Any = score
                ) -> Any:
                    self.rois[stage] = sample
                    return score(sample, stage)

                part.score_rois = score_rois
                views.append(part)
            return seen

        with replaced(teacher, 'view', watched):
            self.distilled()
        read = vars(views[0])
        self.parts = [p for p in ('maps', 'rpn', 'raw_dense') if p in read]

    def teacher(self) -> None:
        """The teacher's part of a distilled step alone."""
        assert self.distiller
        seen = self.distiller.teacher.view(Batch(self.inputs, self.samples))
        for view in seen.parts():
            for part in self.parts:
                getattr(view, part)
            for stage, sample in self.rois.items():
                view.score_rois(sample, stage)


def teacher_of(distiller: Distiller) -> Teacher:
    """A config's frozen network; an error if it has none."""
    if not distiller.teacher.each():
        raise SystemExit(
            'error: the config has no distillation.teacher. Networks that '
            'train together are measured by `scale --networks`.'
        )
    return distiller.teacher


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    args: argparse.Namespace,
    device: str,
) -> dict[str, list[float]]:
    """Seconds of each run, in turn, so that noise meets all alike.

    A first round, to warm up, is not counted. On a GPU the seconds are those
    between two of its events, else the clock's, or the process's with
    ``args.cpu_time``.
    """
    measure = cuda_round if device == 'cuda' else clock_round(args)
    rounds = [measure(runs.values()) for _ in range(args.repeat + 1)]
    times = map(list, zip(*rounds[1:], strict=True))
    return dict(zip(runs, times, strict=True))


def clock_round(args: argparse.Namespace) -> Callable[..., list[float]]:
    """Seconds of each run by a clock of the processor's."""
    clock = time.process_time if args.cpu_time else time.perf_counter

    def measure(runs: Iterable[Callable[[], Any]]) -> list[float]:
        seconds = []
        for run in runs:
            start = clock()
            run()
            seconds.append(clock() - start)
        return seconds

    return measure


def cuda_round(runs: Iterable[Callable[[], Any]]) -> list[float]:
    """Seconds of each run on the GPU, which is waited for once."""
    pairs = []
    for run in runs:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in pairs]


def spread(values: list[float]) -> str:
    """Median and range."""
    median = statistics.median(values)
    return f'{median:.4g} | {min(values):.4g}-{max(values):.4g}'


def ratio_table(what: str, times: Mapping[str, list[float]], base: str) -> str:
    """Seconds, and the ratios to ``base`` round by round."""
    rows = [
        f'| {what} | median s | range | time / {base} | range |',
        '|---|---|---|---|---|',
    ]
    for name, seconds in times.items():
        ratios = [s / b for s, b in zip(seconds, times[base], strict=True)]
        rows.append(
            f'| {name} | {spread(seconds)} | '
            f'**{statistics.median(ratios):.3f}** | '
            f'{min(ratios):.3f}-{max(ratios):.3f} |'
        )
    return '\n'.join(rows)


def size_of(modules: list[nn.Module]) -> float:
    """MiB of the modules' parameters and buffers."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20
