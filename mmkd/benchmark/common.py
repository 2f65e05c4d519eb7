"""What all benchmarks share: networks, batches, clocks and tables."""

import argparse
import copy
import itertools
import logging
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
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
from mmkd.report.tables import table as markdown
from mmkd.teachers.build import changed
from mmkd.teachers.view import Teacher
from mmkd.utils import whole_number

Images = tuple[Tensor, list[DetDataSample]]
Runs = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Benchmark:
    """One command of ``mmkd benchmark``."""

    name: str
    options: dict[str, dict[str, Any]]
    """Its arguments by flag, with the keywords of ``add_argument``."""
    measure: Callable[[argparse.Namespace], dict[str, Any]]
    """Measures, and returns what ``--json`` writes; its docstring is help."""
    table: Callable[[dict[str, Any]], str]
    """Turns that result into the table to print."""


CONFIG = {'config': dict(help='a config with `distillation`')}
OBJECTS: dict[str, dict[str, Any]] = {
    '--objects': dict(
        type=whole_number(0), default=8, help='objects per image'
    )
}


def altered(args: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    """Return the same arguments with other values for some of them."""
    return argparse.Namespace(**{**vars(args), **changes})


# ------------------------------------------------------------------ networks


def load_config(args: argparse.Namespace) -> Config:
    """Return the config of ``args`` with its ``--cfg-options``."""
    cfg = read_config(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    if cfg.get('distillation'):
        cfg.distillation = with_trained_teacher(cfg.distillation)
    return cfg


def make_batch(args: argparse.Namespace, classes: int) -> Images:
    """Make images of noise with random boxes, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    height, width = args.size
    padded = tuple(-(-side // 32) * 32 for side in args.size)
    images = torch.zeros(args.batch, 3, *padded)
    images[..., :height, :width] = torch.randn(
        args.batch, 3, height, width, generator=generator
    )
    meta = dict(
        img_shape=tuple(args.size),
        ori_shape=tuple(args.size),
        pad_shape=padded,
        batch_input_shape=padded,
        scale_factor=(1.0, 1.0),
    )
    samples = []
    for _ in range(args.batch):
        corner = torch.rand(args.objects, 2, generator=generator) * 0.7
        extent = torch.rand(args.objects, 2, generator=generator) * 0.25
        boxes = torch.cat([corner, corner + extent + 0.02], 1)
        labels = torch.randint(classes, (args.objects,), generator=generator)
        sample = DetDataSample(metainfo=meta)
        sample.gt_instances = InstanceData(
            bboxes=boxes * torch.tensor([width, height]).repeat(2),
            labels=labels,
        )
        samples.append(sample.to(args.device))
    return images.to(args.device), samples


def build_student(
    args: argparse.Namespace, cfg: Config
) -> tuple[nn.Module, Images]:
    """Build the student of a config with random weights, and a batch."""
    register_all_modules()
    torch.manual_seed(0)
    model_cfg = copy.deepcopy(cfg.model)
    model_cfg.backbone.init_cfg = None  # speed does not depend on weights
    student = MODELS.build(model_cfg)
    student.init_weights()
    student.to(args.device).train()
    return student, make_batch(args, len(class_names({}, cfg) or ()))


def build(
    args: argparse.Namespace, cfg: Config | None = None
) -> tuple[Distiller, Images]:
    """Build a distiller, not attached to its student, and a batch.

    Args:
        args: The arguments of the command.
        cfg: The config, where it is not as ``args`` say.

    Raises:
        ConfigError: If the config does not distil.
    """
    cfg = load_config(args) if cfg is None else cfg
    if not cfg.get('distillation'):
        raise ConfigError(
            f'{args.config} has no distillation to measure. Give a config '
            'that distils, such as mmkd::faster_rcnn_kd_r50.py.'
        )
    student, batch = build_student(args, cfg)
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
    """Describe the same teachers without their weights."""
    return changed(teacher, lambda options: {**options, 'checkpoint': None})


class Trainer:
    """Iterations of a student with SGD, plain or distilled."""

    def __init__(
        self,
        student: nn.Module,
        images: Images,
        distiller: Distiller | None = None,
    ) -> None:
        self.student: Any = student
        self.distiller = distiller
        self.model: nn.Module = student
        """What is called: the student, or its wrapper."""
        self.images, self.batch = images, Batch(*images)
        adapters = distiller.parameters() if distiller else ()
        self.optimizer = torch.optim.SGD(
            [*student.parameters(), *adapters], lr=1e-6, momentum=0.9
        )

    @classmethod
    def of(cls, args: argparse.Namespace, distils: bool = True) -> 'Trainer':
        """Build a config's student, with its distiller or without."""
        if not distils:
            return cls(*build_student(args, load_config(args)))
        distiller, batch = build(args)
        return cls(distiller.student, batch, distiller)

    def step(self) -> None:
        """Do one iteration; it is distilled if the distiller is attached."""
        losses = self.model(*self.images, mode='loss')
        total, _ = self.student.parse_losses(losses)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()

    plain = step
    """The stock student's iteration, as the distiller is not attached."""

    def distilled(self) -> None:
        """Do one iteration with every method of the config."""
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

                vars(part)['score_rois'] = score_rois
                views.append(part)
            return seen

        with replaced(teacher, 'view', watched):
            self.distilled()
        read = vars(views[0])
        self.parts = [p for p in ('maps', 'rpn', 'raw_dense') if p in read]

    def teacher(self) -> None:
        """Do the teacher's part of a distilled step alone."""
        assert self.distiller
        for view in self.distiller.teacher.view(self.batch).parts():
            for part in self.parts:
                getattr(view, part)
            for stage, sample in self.rois.items():
                view.score_rois(sample, stage)


def teacher_of(distiller: Distiller) -> Teacher:
    """Return the frozen network of a config.

    Raises:
        ConfigError: If it has none.
    """
    if not distiller.teacher.each():
        raise ConfigError(
            'the config has no distillation.teacher. Networks that train '
            'together are measured by `mmkd benchmark scale --networks`.'
        )
    return distiller.teacher


def size_of(modules: Iterable[nn.Module]) -> float:
    """Return the MiB of the modules' parameters and buffers."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


# --------------------------------------------------------- times and tables


class Ratios(list[float]):
    """The quotients of two runs' times, one value per round."""


class Times(dict[str, list[float]]):
    """The seconds of each run by its name, one value per round."""

    @classmethod
    def interleaved(cls, runs: Runs, args: argparse.Namespace) -> 'Times':
        """Time the runs in turn, so that noise meets all of them alike.

        ``torch.utils.benchmark`` measures one piece of code after the other:
        on a machine that others use as well, the ratio of two such numbers
        says more about the others than about the code.

        A first round, to warm up, is not counted. On a GPU the seconds are
        those between two of its events, otherwise the clock's, or the
        process's with ``args.cpu_time``.
        """
        rounds = [one_round(runs, args) for _ in range(args.repeat + 1)]
        times = map(list, zip(*rounds[1:], strict=True))
        return cls(zip(runs, times, strict=True))

    def ratios(self, run: str, *others: str) -> Ratios:
        """Divide what a run takes by the sum of others, round by round."""
        rounds = zip(self[run], *(self[o] for o in others), strict=True)
        return Ratios(own / sum(parts) for own, *parts in rounds)

    def table(self, what: str, base: str) -> str:
        """Show each run's seconds, and their ratios to those of ``base``."""
        return table(
            [what, 'median s', f'time / {base}'],
            [[run, own, self.ratios(run, base)] for run, own in self.items()],
        )


def one_round(runs: Runs, args: argparse.Namespace) -> list[float]:
    """Time each run once by the GPU's events or by a clock."""
    mark: Callable[[], Any] = recorded_event
    if args.device != 'cuda':
        mark = time.process_time if args.cpu_time else time.perf_counter
    marks = [mark()]
    for run in runs.values():
        run()
        marks.append(mark())
    pairs = itertools.pairwise(marks)
    if args.device != 'cuda':
        return [end - start for start, end in pairs]
    torch.cuda.synchronize()  # wait only once, at the end
    return [start.elapsed_time(end) / 1000 for start, end in pairs]


def recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lay out a table in Markdown.

    A list of numbers takes two columns, its median and its range; the median
    of :class:`Ratios`, which a table is about, is bold.
    """
    headings = [header[0]]
    for heading, value in zip(header[1:], rows[0][1:], strict=True):
        headings.append(heading)
        if isinstance(value, list):
            headings.append('range')
    return markdown(headings, map(cells, rows))


def cells(row: Sequence[Any]) -> list[str]:
    """Write the values of a row as text (see :func:`table`)."""
    found = []
    for value in row:
        if isinstance(value, Ratios):
            found.append(f'**{statistics.median(value):.3f}**')
            found.append(f'{min(value):.3f}-{max(value):.3f}')
        elif isinstance(value, list):
            found.append(f'{statistics.median(value):.4g}')
            found.append(f'{min(value):.4g}-{max(value):.4g}')
        else:
            is_float = isinstance(value, float)
            found.append(f'{value:.4g}' if is_float else str(value))
    return found


def each(
    names: Iterable[Any],
    measure: Callable[[Any], dict[str, Any]],
    row: Callable[[Any, dict[str, Any]], Sequence[Any]],
) -> dict[Any, dict[str, Any]]:
    """Measure one after the other; print a row as soon as it is known."""
    found = {}
    for name in names:
        found[name] = measure(name)
        print(' | '.join(cells(row(name, found[name]))), flush=True)
    return found


def in_processes(
    number: int, function: Callable[..., Any], *args: Any
) -> list[Any]:
    """Call a function in so many fresh processes, with the rank as well.

    What they print goes to stderr, as MMDetection prints when it is imported.
    """
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(number, context, os.dup2, (2, 1)) as pool:
        return [*pool.map(partial(_silent, function, *args), range(number))]


def _silent(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function without a log of each parameter, and warnings."""
    logging.disable(logging.WARNING)
    warnings.simplefilter('ignore')
    return function(*args)
