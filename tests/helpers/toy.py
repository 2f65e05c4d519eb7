"""Tiny detectors on small photos: the training runs of the tests.

Stock configs, shrunk: narrow layers, few photos, read small. Nothing else of
them is changed, and what is built from them is the real thing.
"""

import copy
import functools
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import runpy
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mmengine.runner.runner
import torch
import yapf.yapflib.yapf_api
from mmdet.datasets import CocoDataset
from mmdet.models.task_modules.samplers import RandomSampler
from mmdet.registry import TASK_UTILS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.hub import get_config
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper
from mmengine.registry import (
    HOOKS,
    METRICS,
    MODELS,
    OPTIM_WRAPPERS,
    RUNNERS,
    DefaultScope,
)
from mmengine.runner import Runner

from mmkd.detectors import shrink
from mmkd.detectors.shrink import SCALE, small_model, small_step
from mmkd.engine.hooks import ReachCheckHook
from tests.helpers import made_data

__all__ = ['SCALE', 'small_model', 'small_step']

ROOT = Path(__file__).resolve().parents[2]
FASTER_RCNN = 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
RETINANET = 'retinanet/retinanet_r50_fpn_1x_coco.py'
PAA = 'paa/paa_r50_fpn_1x_coco.py'
RUNNER = 'mmkd.DistillationRunner'
HINT = dict(type='mmkd.FeatureHint')
FRCNN = dict(type='mmkd.FasterRCNNDistillation')
LAD = dict(type='mmkd.LabelAssignmentDistillation')

# What a tiny run spends most of its time on otherwise: laying out the text of
# its config, asking for the machine, and collecting garbage among imports.
yapf.yapflib.yapf_api.FormatCode = lambda code, **_: (code, True)
mmengine.runner.runner.collect_env = functools.cache(
    mmengine.runner.runner.collect_env
)
gc.freeze()


# ------------------------------------------------------------------- configs


@functools.cache
def stock(name: str) -> Config:
    return get_config(f'mmdet::{name}')


def small_data(cfg: Config, *, images: int = 8, batch: int = 2) -> None:
    """Let a COCO config read a few photos at 128 x 96."""
    root = made_data.root() / 'coco_tiny'
    shrink.small_data(cfg, root, images=images, batch=batch)


def in_order(cfg: Config) -> None:
    """Let every process read the same images alike, one after the other."""
    for step in cfg.train_dataloader.dataset.pipeline:
        if step.type == 'Resize':
            step.keep_ratio = False  # the same padding for all
        elif step.type == 'RandomFlip':
            step.prob = 0.0
    cfg.train_dataloader.sampler.shuffle = False
    cfg.train_dataloader.pop('batch_sampler')


def plain(
    work_dir: Path, base: str = FASTER_RCNN, *, epochs: int = 1, **data: Any
) -> Config:
    """A stock config, shrunk, to be trained on a few photos."""
    cfg = copy.deepcopy(stock(base))
    cfg.model = small_model(cfg.model)
    small_data(cfg, **data)
    cfg.train_cfg = dict(
        type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=1
    )
    # From the first iteration on, as fast as it goes without breaking.
    cfg.param_scheduler = []
    cfg.optim_wrapper.clip_grad = dict(max_norm=5.0)
    cfg.work_dir = str(work_dir)
    cfg.randomness = dict(seed=3)
    cfg.default_hooks.logger.interval = 1
    return cfg


def distilled(
    work_dir: Path,
    base: str = FASTER_RCNN,
    *,
    methods: Mapping[str, Any] | None = None,
    teacher: Mapping[str, Any] | None = None,
    **options: Any,
) -> Config:
    """The same with distillation beside it, by default from an equal."""
    cfg = plain(work_dir, base, **options)
    cfg.runner_type = RUNNER
    cfg.distillation = dict(
        teacher=untrained(cfg) if teacher is None else teacher,
        methods={'hint': HINT} if methods is None else methods,
    )
    return cfg


def untrained(cfg: Config) -> dict[str, Any]:
    """The description of an untrained teacher like the student."""
    return dict(config=teacher_config(cfg), checkpoint=None)


def teacher_config(cfg: Config) -> dict[str, Any]:
    """What a teacher needs of a config: the model and the class names."""
    return dict(
        model=copy.deepcopy(cfg.model.to_dict()),
        test_dataloader=cfg.test_dataloader.to_dict(),
    )


def stock_classes() -> list[str]:
    return list(CocoDataset.METAINFO['classes'])


def detector(model: Mapping[str, Any]) -> Any:
    """A stock detector of a config, initialised."""
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmdet'):
        built = MODELS.build(copy.deepcopy(model))  # detectors change it
        built.init_weights()
    return built


def write(cfg: Config, path: Path) -> Path:
    """The config as a file, for the command line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cfg.dump(str(path))
    return path


# ------------------------------------------------------------------ training


def build(cfg: Config) -> Runner:
    """What the command line builds, each with a name of its own."""
    gc.collect()  # earlier runs, and with them the workers of their loaders
    cfg.experiment_name = cfg.visualizer.name = uuid.uuid4().hex
    if 'runner_type' in cfg:
        return RUNNERS.build(cfg)
    return Runner.from_cfg(cfg)


def train(cfg: Config, *hooks: Hook) -> Runner:
    runner = build(cfg)
    for hook in hooks:
        runner.register_hook(hook)
    runner.train()
    return runner


class Record(Hook):
    """What a training run has computed, iteration by iteration."""

    not_resumed = ('losses', 'gradients', 'states', 'metrics', '_logged')

    def __init__(self) -> None:
        self.losses: list[dict[str, float]] = []
        self.gradients: list[list[torch.Tensor | None]] = []
        self.states: list[torch.Tensor] = []
        self.metrics: list[dict] = []
        self._logged = -1

    def before_train(self, runner: Runner) -> None:
        student = getattr(runner.model, 'module', runner.model)
        self.named = [
            (name, parameter)
            for name, parameter in student.named_parameters()
            if not name.startswith('distillation.')
        ]
        runner.optim_wrapper.optimizer.register_step_pre_hook(self._gradients)

    def _gradients(self, *_: Any) -> None:
        self.gradients.append(
            [None if p.grad is None else p.grad.clone() for _, p in self.named]
        )
        self.states.append(torch.get_rng_state())

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        self.losses.append({k: v.item() for k, v in outputs.items()})

    def after_val_epoch(self, runner: Runner, metrics=None) -> None:
        self.metrics.append(dict(metrics))


def differing(a: Any, b: Any, place: str = 'it') -> str:
    """Where nested tensors, numbers and texts differ first; '' if nowhere."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
        return '' if same else f'{place}: {a} and {b}'
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if a.keys() != b.keys():
            return f'{place}: {sorted(map(str, a.keys() ^ b.keys()))}'
        pairs = [(f'{place}.{key}', a[key], b[key]) for key in a]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f'{place}: {a} and {b}'
        pairs = [
            (f'{place}[{i}]', *p) for i, p in enumerate(zip(a, b, strict=True))
        ]
    else:
        same = type(a) is type(b) and a == b
        return '' if same else f'{place}: {a!r} and {b!r}'
    found = (differing(*both, name) for name, *both in pairs)
    return next(filter(None, found), '')


def same(a: Any, b: Any) -> bool:
    """Whether nested tensors, numbers and texts are bit for bit the same."""
    return not differing(a, b)


def load(path: Path | str) -> dict[str, Any]:
    return torch.load(path, map_location='cpu', weights_only=False)


# ------------------------------------------------------------ real processes

_processes = multiprocessing.get_context('forkserver')
_processes.set_forkserver_preload(['tests.helpers.toy_preload'])


@functools.cache
def _start_forkserver() -> None:
    path = os.environ.get('PYTHONPATH')
    os.environ['PYTHONPATH'] = str(ROOT)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop('PYTHONPATH')
        if path is not None:
            os.environ['PYTHONPATH'] = path


class Job:
    """``python SCRIPT ARGUMENTS`` in a process that has all imported."""

    def __init__(
        self,
        log: Path,
        script: str,
        *arguments: Any,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
    ) -> None:
        _start_forkserver()
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        texts = [str(argument) for argument in arguments]
        job = (str(log), str(cwd), script, texts, dict(env or {}))
        self.process = _processes.Process(target=_run_script, args=job)
        self.process.start()

    def wait(self) -> int:
        """Return the exit status; a test that is stopped stops the job."""
        try:
            self.process.join()
        except BaseException:
            self.process.kill()
            print(self.text())
            raise
        return self.process.exitcode

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ''


def _run_script(
    log: str, cwd: str, script: str, arguments: list[str], env: dict[str, str]
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(cwd)
    os.environ.update(env)
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name='__main__')


def tool(log: Path, script: str, *arguments: Any, **options: Any) -> Job:
    """Run a tool to its end."""
    job = Job(log, script, *arguments, **options)
    job.wait()
    return job


@HOOKS.register_module(name='ToyKillAt')
class KillAt(Hook):
    """Ends its process in or after the second epoch, as a power failure would.

    The moment is that of the environment variable ``TOY_KILL_AT``, so that
    the run that is killed and the one that continues it have one config.
    """

    priority = 'LOWEST'  # after the logger
    renamed = {
        'before last_checkpoint': 'epoch_2.pth',
        'after a save': 'last_checkpoint',
    }
    """The file behind whose renaming a moment lies."""

    def __init__(self) -> None:
        self.moment = os.environ.get('TOY_KILL_AT')

    def before_train(self, runner: Runner) -> None:
        replace, last = os.replace, self.renamed.get(self.moment)

        def replace_and_end(source: Any, target: Any) -> None:
            replace(source, target)
            if runner.epoch == 1 and Path(target).name == last:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace_and_end if last else replace

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        if self.moment == 'within an epoch' and runner.epoch == batch_idx == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self.moment == 'while writing' and runner.epoch == 1:
            # The system ends a process that writes more than this to a file.
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            for what, most in ('FSIZE', 300_000), ('CORE', 0):
                number = getattr(resource, f'RLIMIT_{what}')
                hard = resource.getrlimit(number)[1]
                resource.setrlimit(number, (most, hard))

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        if (self.moment, runner.epoch, batch_idx) == ('in validation', 2, 0):
            os.kill(os.getpid(), signal.SIGKILL)


@HOOKS.register_module(name='ToySignal')
class Signal(Hook):
    """Sends a signal to its process and the workers of its loaders.

    The environment variable ``TOY_SIGNAL`` says which, and when, such as
    ``'TERM iteration 2'``; ``TOY_SIGNAL_RANK`` in which process (the first).
    What the workers are is left in the work dir.
    """

    priority = 'VERY_HIGH'
    not_resumed = ('name', 'moment')

    def __init__(self) -> None:
        said = os.environ.get('TOY_SIGNAL', ' ')
        self.name, _, self.moment = said.partition(' ')
        if self.name:
            os.setpgid(0, 0)  # without the tests

    def reach(self, runner: Runner, moment: str) -> None:
        rank = int(os.environ.get('TOY_SIGNAL_RANK', '0'))
        if moment != self.moment or runner.rank != rank:
            return
        self.moment = ''
        workers = [child.pid for child in multiprocessing.active_children()]
        Path(runner.work_dir, 'workers').write_text(f'{workers}')
        # From outside, as systems do: workers obey this process.
        group = f'-{os.getpgid(0)}'
        command = ['kill', '-s', self.name, '--', group]
        subprocess.run(command, check=True, start_new_session=True)

    def before_run(self, runner: Runner) -> None:
        self.reach(runner, 'start')

    def before_train(self, runner: Runner) -> None:
        self.reach(runner, 'train')

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        self.reach(runner, f'iteration {runner.iter + 1}')

    def after_train_epoch(self, runner: Runner) -> None:
        self.reach(runner, f'epoch {runner.epoch + 1}')

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        self.reach(runner, f'validation {runner.epoch}')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.reach(runner, f'save {runner.epoch + 1}')


@HOOKS.register_module(name='ToyFullDisk')
class FullDisk(Hook):
    """Lets no file grow beyond what fits half a checkpoint, from an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if runner.epoch == self.epoch:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))


@METRICS.register_module(name='ToyFalling')
class Falling(BaseMetric):
    """Falls from one validation to the next."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list) -> dict[str, float]:
        epoch = MessageHub.get_current_instance().get_info('epoch')
        return {'falling': 10.0 - epoch}


@OPTIM_WRAPPERS.register_module(name='ToyCpuAmpOptimWrapper')
class CpuAmpOptimWrapper(OptimWrapper):
    """Mixed precision on the CPU; MMEngine's is for GPUs alone."""

    def __init__(self, *, scale: bool, **options: Any) -> None:
        super().__init__(**options)
        self.scaler = torch.amp.GradScaler('cpu', enabled=scale)

    @contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast('cpu'):
            yield

    def backward(self, loss: torch.Tensor, **options: Any) -> None:
        self.scaler.scale(loss).backward(**options)

    def step(self, **options: Any) -> None:
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer, **options)
        self.scaler.update()


@TASK_UTILS.register_module(name='ToyFirstSampler')
class FirstSampler(RandomSampler):
    """Samples the first boxes instead of random ones."""

    def random_choice(self, gallery: Any, num: int) -> Any:
        return gallery[:num]


@HOOKS.register_module(name='ToySaveRecord')
class SaveRecord(Record):
    """Leaves what each process has computed in the work dir."""

    def after_train(self, runner: Runner) -> None:
        student = getattr(runner.model, 'module', runner.model)
        content = dict(
            losses=self.losses,
            gradients=self.gradients,
            weights=student.state_dict(),
            balances=dict(runner.distiller.balances),
        )
        path = Path(runner.work_dir, f'record_{runner.rank}.pth')
        torch.save(content, path)


@HOOKS.register_module(name='ToyFailSecond')
class FailSecond(Hook):
    """The teacher of the second process breaks."""

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        if runner.rank == 1 and runner.iter == 1:
            for parameter in runner.distiller.teacher.model.parameters():
                parameter.data.fill_(float('nan'))


@HOOKS.register_module(name='ToySpoilOne')
class SpoilOne(Hook):
    """In one process, a loss of the student or a buffer becomes NaN."""

    priority = 'LOW'

    def __init__(self, rank: int, what: str) -> None:
        self.rank, self.what = rank, what

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        if (runner.rank, runner.iter, self.what) == (self.rank, 1, 'loss'):
            student = getattr(runner.model, 'module', runner.model)
            student.rpn_head.rpn_cls.register_forward_hook(
                lambda module, inputs, output: output * float('nan')
            )

    def after_train_epoch(self, runner: Runner) -> None:
        if (runner.rank, self.what) == (self.rank, 'buffer'):
            student = getattr(runner.model, 'module', runner.model)
            student.backbone.bn1.running_var.fill_(float('nan'))


@HOOKS.register_module(name='ToyReachUnchecked')
class ReachUnchecked(ReachCheckHook):
    """Takes the place of the hook, and measures nothing."""

    def observe(self, task: Any, distilled: Any) -> None:
        pass
