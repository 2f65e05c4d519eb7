"""What the benchmarks share: batches, networks, clocks, the environment."""

import argparse
import copy
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import mmdet
import mmengine
import torch
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor, nn

import mmkd
from mmkd.distiller import Distiller, build_distiller
from mmkd.several_teachers import is_list, is_mean, single_views
from mmkd.teacher import class_names

Batch = tuple[Tensor, list[DetDataSample]]


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
    cfg = load_config(args)
    return cfg, *student_of(cfg, args, device)


def load_config(args: argparse.Namespace) -> Config:
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    return cfg


def student_of(
    cfg: Config, args: argparse.Namespace, device: str
) -> tuple[nn.Module, Batch]:
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


def build(args: argparse.Namespace, device: str) -> tuple[Distiller, Batch]:
    """The student with its distiller (not attached) and a batch."""
    return build_together(load_config(args), args, device)


def build_together(
    cfg: Config, args: argparse.Namespace, device: str
) -> tuple[Distiller, Batch]:
    """The same of a config that has been read."""
    student, batch = student_of(cfg, args, device)
    distillation = copy.deepcopy(cfg.distillation)
    if 'teacher' in distillation:
        untrain(distillation.teacher)
    for peer in distillation.get('peers', {}).values():
        peer.cfg_options = {'model.backbone.init_cfg': None}
    classes = class_names({}, cfg) or ()
    return build_distiller(distillation, student, classes), batch


def untrain(teacher: Any) -> None:
    """Take the weights from descriptions of teachers, in place."""
    if is_mean(teacher):
        teacher = teacher['mean']
    if not is_list(teacher):
        teacher['checkpoint'] = None
        return
    for each in teacher:
        untrain(each)


class Trainer:
    """Iterations of a student with SGD, plain or distilled."""

    def __init__(
        self,
        student: nn.Module,
        batch: Batch,
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

        def watched(*args: Any) -> Any:
            seen = teacher(*args)
            for view in single_views(seen):
                score = view.score_rois

                def score_rois(
                    sample: Any, stage: int, score: Any = score
                ) -> Any:
                    self.rois[stage] = sample
                    return score(sample, stage)

                view.score_rois = score_rois
                views.append(view)
            return seen

        self.distiller.teacher = watched
        try:
            self.distilled()
        finally:
            self.distiller.teacher = teacher
        read = vars(views[0])
        self.parts = [p for p in ('maps', 'rpn', 'dense') if p in read]

    def teacher(self) -> None:
        """The teacher's part of a distilled step alone."""
        assert self.distiller
        seen = self.distiller.teacher(self.inputs, self.samples)
        for view in single_views(seen):
            for part in self.parts:
                getattr(view, part)
            for stage, sample in self.rois.items():
                view.score_rois(sample, stage)


def teacher_of(distiller: Distiller) -> Any:
    """A config's frozen network; an error if it has none."""
    if distiller.teacher is None:
        raise SystemExit(
            'error: the config has no distillation.teacher. Networks that '
            'train together are measured by `scale --networks`.'
        )
    return distiller.teacher


def timed(
    run: Callable[[], None],
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of one call, kernels on a GPU included."""
    if device == 'cuda':
        torch.cuda.synchronize()
    start = clock()
    run()
    if device == 'cuda':
        torch.cuda.synchronize()
    return clock() - start


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    device: str,
    repeat: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run, in turn, so that noise meets all alike.

    A first round, to warm up, is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeat + 1):
        for name, run in runs.items():
            seconds = timed(run, device, clock)
            if number:
                times[name].append(seconds)
    return times


def spread(values: list[float]) -> str:
    """Median and range."""
    median = statistics.median(values)
    return f'{median:.4g} | {min(values):.4g}-{max(values):.4g}'


def size_of(modules: list[nn.Module]) -> float:
    """MiB of the modules' parameters and buffers."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def environment(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    commit = subprocess.run(
        ['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True
    ).stdout.strip()
    name = platform.processor() or platform.machine()
    given = {
        key: value if isinstance(value, int | float | list) else str(value)
        for key, value in vars(args).items()
        if value is not None
    }
    return {
        **given,
        'device': torch.cuda.get_device_name() if device == 'cuda' else name,
        'python': platform.python_version(),
        'torch': torch.__version__,
        'mmengine': mmengine.__version__,
        'mmdet': mmdet.__version__,
        'mmkd': mmkd.__version__,
        'commit': commit or None,
    }
