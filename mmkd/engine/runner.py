"""The runner that distils: MMEngine's, with a Distiller while it trains."""

import copy
import os
import os.path as osp
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from mmengine.config import Config
from mmengine.dist import (
    all_gather_object,
    gather_object,
    get_world_size,
    is_main_process,
)
from mmengine.fileio import dump
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOG_PROCESSORS
from mmengine.runner import BaseLoop, LogProcessor, Runner
from torch import nn

from mmkd.core.distiller import Distiller, build_distiller
from mmkd.data.checkpoint_file import check_checkpoint, write_atomically
from mmkd.data.checkpoint_loader import OPT_IN, safe_checkpoints, trusts
from mmkd.data.checkpoint_reader import read_checkpoint
from mmkd.data.files import real_path, write_text
from mmkd.data.unlabelled.stream import UnlabelledStream
from mmkd.detectors.wrappers import check_is_detector
from mmkd.errors import (
    CheckpointError,
    ConfigError,
    MMKDError,
    NonFiniteError,
)
from mmkd.peers.peer import Peer, save_peers, with_trained_teacher
from mmkd.registry import HOOKS, RUNNERS
from mmkd.teachers.several import log_name
from mmkd.utils import (
    ATTACHED,
    build_checked,
    check_seed,
    find_class,
    named_class,
)

from .checkpoint import (
    check_resumable,
    checkpoint_folders,
    join_checkpoint,
    latest_checkpoint,
    split_checkpoint,
)
from .classes import check_validation, training_classes
from .config_checks import check_keys, check_mixed_precision, remarks
from .data_guard import (
    check_images,
    explain_data_error,
    name_unreadable_images,
    told_in_a_line,
)
from .finite import FiniteState, how_to_go_on, in_words
from .hooks import (
    GradientBalanceHook,
    LossCheckHook,
    PeerValidationHook,
    ProgressHook,
    ReachCheckHook,
    SafeCheckpointHook,
)
from .log_processor import TrainingLog
from .logs import tell_once_if_full
from .optimizer import build_for
from .preemption import PreemptionHook
from .processes import raise_together
from .provenance import Provenance, described, differences
from .resume import ExactResumeHook
from .unlabelled import blank_loader, open_stream, say_leaks
from .work_dir import one_training, training_in

WITH_TRACES = ProgressHook | LossCheckHook | GradientBalanceHook
"""Hooks that leave something as it was when the training ends or breaks."""


@RUNNERS.register_module()
class DistillationRunner(Runner):
    """Train the config's ``model`` with its ``distillation``.

    The model is the stock student. :meth:`train` builds the teacher, the
    methods and their adapters and attaches them before the optimiser is
    built; :meth:`val` and :meth:`test` know nothing of them. In addition, the
    runner

    * keeps checkpoints stock (``distillation`` is a key of its own), writes
      them atomically and removes an old one only after the new one is
      complete;
    * shows its progress in a terminal, and a summary at the end;
    * ends on a signal (SIGTERM, SIGINT, SIGUSR1, …) after the iteration, with
      a checkpoint;
    * resumes exactly: it restores all random states, those of the loader's
      workers too, and repeats the validation that follows a checkpoint;
    * starts distributed training on machines without a GPU as well (gloo).

    Without ``distillation`` it is MMEngine's runner with these five additions.

    Example:
        >>> from mmengine.config import Config
        >>> from mmkd.engine.runner import DistillationRunner
        >>> path = 'configs/faster_rcnn_kd_r50.py'
        >>> # This needs COCO in data/coco and takes many hours.
        >>> config = Config.fromfile(path)  # doctest: +SKIP
        >>> DistillationRunner.from_cfg(config).train()  # doctest: +SKIP
    """

    model: Any
    _load_from: str | None
    distiller: Distiller | None = None
    _classes: tuple[str, ...] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._exact = ExactResumeHook()
        self._preemption = PreemptionHook(self._exact.forget_validation)
        self._random_states: list[dict[str, Any]] = []
        self._memories: list[dict[str, Any]] = []
        self._steps: int | None = None
        self.unlabelled_stream: UnlabelledStream | None = None
        self._taken = 0
        self._saved: dict[str, Any] = {}
        self._on_hosts: Any = None
        self._provenance: Provenance | None = None
        self._made_with: dict[str, Any] = {}
        self.finite = FiniteState({}, {})
        self.finite_checkpoint: str | None = None
        with safe_checkpoints(trusts(kwargs.get('cfg') or {})):
            super().__init__(*args, **kwargs)
        self.register_hook(self._exact)
        check_keys(self.cfg)
        if self.cfg.get('distillation'):
            self.cfg.distillation = with_trained_teacher(self.cfg.distillation)

    def train(self) -> nn.Module:
        """Attach the distiller, train, and leave the stock student.

        Raises:
            Preempted: If a signal has ended the training;
                KeyboardInterrupt, if it was SIGINT.
            WorkDirError: If another training is at work in the work dir.
        """
        with (
            safe_checkpoints(trusts(self.cfg)),
            one_training(self.work_dir),
            self._preemption.watching(self),
        ):
            return self._train()

    def _train(self) -> nn.Module:
        try:
            for remark in remarks(self.cfg, self.hooks, self.log_processor):
                self.logger.warning(remark)
            self._find_resumed()
            self._attach()
            self._wrap()
            self._register_once(ProgressHook)
            self._register_once(LossCheckHook)
            self._provenance = Provenance(
                self.cfg, self.distiller, (self._student(), *self.hooks)
            )
            # What it restores is what the others have left.
            last = [self._preemption, self._exact]
            others = [hook for hook in self.hooks if hook not in last]
            self._hooks = [*others, *last]
            with told_in_a_line():
                return super().train()
        finally:
            self._detach()
            if self.unlabelled_stream is not None:
                self.unlabelled_stream.close()
            for hook in self.hooks:
                if isinstance(hook, WITH_TRACES):
                    hook.close()

    def val(self) -> dict:
        """Validate the stock student."""
        self._wrap()
        with told_in_a_line():
            return super().val()

    def test(self) -> dict:
        """Test the stock student."""
        self._wrap()
        with told_in_a_line():
            return super().test()

    # -- attaching ---------------------------------------------------------

    def _attach(self) -> None:
        cfg = self.cfg.get('distillation')
        if cfg is None or self._train_loop is None:
            self.logger.info(
                'The config has no `distillation`: this is plain training'
            )
            return
        check_is_detector(self._student(), 'student')
        self.unlabelled_stream = open_stream(self.cfg, self.seed or 0)
        if self.unlabelled_stream is not None and cfg.unlabelled.get('alone'):
            self._train_dataloader = blank_loader(
                self.cfg, self.unlabelled_stream
            )
        self._classes = training_classes(self.train_loop.dataloader.dataset)
        self.model = self._student()
        self.distiller = build_distiller(
            cfg, self.model, self._classes, self.seed or 0
        )
        for dataset in self._taught_on():
            self.distiller.teacher.prepare_data(dataset)
        self.logger.info(_described(self.distiller))
        self.distiller.epoch_length = len(self.train_loop.dataloader)
        if self.distiller.unlabelled is not None:
            self.distiller.unlabelled.stream = self.unlabelled_stream
        self.distiller.attach()
        self._register_once(ReachCheckHook)
        if self._peers:
            self._register_once(PeerValidationHook)

    def _taught_on(self) -> list[Any]:
        """The data sets on whose images methods read the teacher."""
        assert self.distiller is not None
        methods = self.distiller.methods.values()
        found = []
        if not (
            self.distiller.alone or all(m.only_unlabelled for m in methods)
        ):
            found.append(self.train_loop.dataloader.dataset)
        if self.unlabelled_stream is not None:
            found.append(self.unlabelled_stream.dataset)
        return found

    def _detach(self) -> None:
        """Remove the distiller from the student and its average (EMA)."""
        averages = [getattr(hook, 'ema_model', None) for hook in self.hooks]
        for model in (self._student(), *averages):
            attached = getattr(getattr(model, 'module', model), ATTACHED, None)
            if attached is not None:
                attached.detach()

    def _student(self) -> nn.Module:
        return self.model.module if self._wrapped else self.model

    @property
    def _attached(self) -> nn.Module | None:
        return getattr(self._student(), ATTACHED, None)

    def set_randomness(self, seed: Any, *args: Any, **kwargs: Any) -> None:
        """Seed all generators; see :meth:`Runner.set_randomness`."""
        check_seed({'seed': seed})
        super().set_randomness(seed, *args, **kwargs)

    def register_hook(self, hook: Hook | dict, priority: Any = None) -> None:
        """Register a hook; check the options of mmkd's own hooks.

        :class:`~mmkd.engine.hooks.SafeCheckpointHook` takes the place of
        MMEngine's checkpoint hook, however the config names it.
        """
        kind = hook.get('type') if isinstance(hook, dict) else None
        if not str(kind).startswith('mmkd.'):
            kind = named_class(MMENGINE_HOOKS, kind)
        if kind is CheckpointHook:
            kind = SafeCheckpointHook
        if isinstance(kind, str) or kind in HOOKS.module_dict.values():
            options = {**hook, 'type': kind}
            set_there = options.pop('priority', None)
            priority = set_there if priority is None else priority
            hook = build_checked(HOOKS, options, 'custom_hooks')
        super().register_hook(hook, priority)

    def _register_once(self, hook: type[Hook]) -> None:
        if not any(isinstance(each, hook) for each in self.hooks):
            self.register_hook(hook())

    def dump_config(self) -> None:
        """Write the config as a whole, where no other training is at work.

        A config that lies in the work dir stays as its author wrote it; the
        folder of the logs holds it as a whole.
        """
        if training_in(self.work_dir) or not is_main_process():
            return
        name = self.cfg.filename or f'{self.timestamp}.py'
        folder = real_path(self.work_dir)
        if self.cfg.filename and real_path(name).parent == folder:
            return
        text = self.cfg.pretty_text
        if not name.endswith('.py'):
            text = dump(self.cfg.to_dict(), file_format=name.split('.')[-1])
        write_text(Path(self.work_dir, osp.basename(name)), text)

    def _init_model_weights(self) -> None:
        """Initialise only the student: the adapters already have weights."""
        student = self._student()
        attached = student._modules.pop(ATTACHED, None)
        try:
            super()._init_model_weights()
        finally:
            if attached is not None:
                student._modules[ATTACHED] = attached

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """Build the logger; see :meth:`Runner.build_logger`."""
        logger = super().build_logger(*args, **kwargs)
        tell_once_if_full(logger)
        return logger

    def build_log_processor(
        self, log_processor: LogProcessor | dict
    ) -> LogProcessor:
        """Build what writes the log: :class:`TrainingLog` for MMEngine's."""
        if isinstance(log_processor, dict):
            kind = log_processor.get('type', LogProcessor)
            if named_class(LOG_PROCESSORS, kind) is LogProcessor:
                log_processor = {**log_processor, 'type': TrainingLog}
        return super().build_log_processor(log_processor)

    # -- distributed start -------------------------------------------------

    def setup_env(self, env_cfg: dict) -> None:
        """Start the process group, on machines without a GPU as well."""
        if (
            self._launcher == 'pytorch'
            and not torch.cuda.is_available()
            and not torch_dist.is_initialized()
        ):
            # MMEngine selects a CUDA device before it asks for the backend.
            seconds = env_cfg.get('dist_cfg', {}).get('timeout')
            torch_dist.init_process_group(
                'gloo', timeout=seconds and timedelta(seconds=seconds)
            )
        super().setup_env(env_cfg)

    @property
    def _wrapped(self) -> bool:
        return is_model_wrapper(self.model)

    def wrap_model(
        self, model_wrapper_cfg: dict | None, model: nn.Module
    ) -> nn.Module:
        """Move the model to its device; :meth:`_wrap` wraps it later.

        The adapters come first, because the wrapper must know every parameter.
        """
        if not self.distributed or is_model_wrapper(model):
            return super().wrap_model(model_wrapper_cfg, model)
        return model.to(self._device())

    def _wrap(self) -> None:
        if not self.distributed or self._wrapped:
            return
        cfg = copy.deepcopy(self.cfg.get('model_wrapper_cfg'))
        if not torch.cuda.is_available():
            cfg = {'type': 'MMDistributedDataParallel', **(cfg or {})}
            cfg.setdefault('device_ids', None)
            cfg.setdefault('broadcast_buffers', False)
            cfg.setdefault(
                'find_unused_parameters',
                self.cfg.get('find_unused_parameters', False),
            )
        self.model = super().wrap_model(cfg, self.model)

    @staticmethod
    def _device() -> torch.device:
        if torch.cuda.is_available():
            return torch.device('cuda', torch.cuda.current_device())
        return torch.device('cpu')

    # -- peers -------------------------------------------------------------

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """Build the optimiser; its settings by name are the student's."""
        build = super().build_optim_wrapper
        if self.distiller is None:
            return build(optim_wrapper)
        return build_for(self.distiller, optim_wrapper, build)

    @property
    def _peers(self) -> dict[str, Peer]:
        return {} if self.distiller is None else dict(self.distiller.peers)

    # -- checkpoints -------------------------------------------------------

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Register MMEngine's default hooks, with a safer checkpoint hook."""
        hooks = dict(hooks or {})
        checkpoint = hooks.get('checkpoint')
        if isinstance(checkpoint, dict):
            kind = named_class(MMENGINE_HOOKS, checkpoint.get('type'))
            if kind is CheckpointHook:
                hooks['checkpoint'] = {'interval': 1, **checkpoint}
        super().register_default_hooks(hooks)

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call the hooks; convert checkpoints between file and memory.

        In a file ``state_dict`` is stock; in memory it also holds the weights
        of the distillation.
        """
        if fn_name == 'after_load_checkpoint' and self._attached is not None:
            own = self._attached.state_dict(prefix=f'{ATTACHED}.')
            join_checkpoint(kwargs['checkpoint'], own, resume=self._resume)
        if fn_name == 'before_train':
            self._note_finite()
        super().call_hook(fn_name, **kwargs)
        if fn_name == 'before_save_checkpoint':
            checkpoint = kwargs['checkpoint']
            split_checkpoint(checkpoint)
            self._check_finite(checkpoint)
            checkpoint[ATTACHED]['random_states'] = self._random_states
            checkpoint[ATTACHED]['memories'] = self._memories
            if self._provenance is not None:
                checkpoint[ATTACHED]['made_with'] = self._provenance.facts()
            if self.distiller is not None:
                checkpoint[ATTACHED]['steps'] = self.distiller.steps
            if self.unlabelled_stream is not None:
                checkpoint[ATTACHED]['unlabelled'] = (
                    self.unlabelled_stream.taken
                )
            self._saved = checkpoint

    def _note_finite(self) -> None:
        """Note what is not finite when the training begins."""
        self.finite = FiniteState(
            self._student().state_dict(), self.optim_wrapper.state_dict()
        )
        if found := self.finite.at_the_beginning:
            self.logger.warning(
                f'Not finite from the beginning is {in_words(found)}. That is '
                'right for a mask, say; weights may come from a run that had '
                'diverged.'
            )
        elif self._resume:
            self.finite_checkpoint = self._load_from

    def _check_finite(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save what has become NaN or infinite."""
        if found := self.finite.problems_of(checkpoint):
            raise NonFiniteError(
                f'the checkpoint of iteration {checkpoint["meta"]["iter"]} is '
                f'not saved, because {in_words(found)} holds NaN or infinite '
                'numbers, and did not when the training began. '
                f'{how_to_go_on(self.finite_checkpoint)}'
            )

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> Any:
        """Load weights; see :meth:`Runner.load_checkpoint`.

        Raises:
            CheckpointError: If the file is missing or truncated.
        """
        check_checkpoint(filename)
        with safe_checkpoints(trusts(self.cfg)):
            checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        if self._resume and filename == self._load_from:
            check_resumable(checkpoint, filename)
        attached = checkpoint.get(ATTACHED, {})
        self._random_states = attached.get('random_states', [])
        self._memories = attached.get('memories', [])
        self._made_with = attached.get('made_with', {})
        self._steps = attached.get('steps')
        self._taken = attached.get('unlabelled', 0)
        return checkpoint

    def save_checkpoint(
        self, out_dir: str, filename: str, *args: Any, **kwargs: Any
    ) -> None:
        """Save completely or not at all; see :meth:`Runner.save_checkpoint`.

        Raises:
            CheckpointError: If the disk is full or the folder is not
                writable.
        """
        # Every process takes part in this, and only the first in MMEngine's.
        self._random_states = all_gather_object(self._exact.capture(self))
        whole = kwargs.get('save_optimizer', True)  # it can be resumed from
        memory = self._exact.remember(self) if whole else {}
        self._memories = self._gather(memory)
        save = super().save_checkpoint
        path = osp.join(out_dir, filename)
        error: MMKDError | None = None

        def write(path: str) -> None:
            # The student's comes last: it is the one that is resumed, and a
            # run that has nothing left to train would not write the others.
            save(out_dir, osp.basename(path), *args, **kwargs)
            save_peers(out_dir, filename, self._peers, self._saved)

        try:
            if '://' in out_dir or not is_main_process():
                save(out_dir, filename, *args, **kwargs)
            else:
                os.makedirs(out_dir, exist_ok=True)
                write_atomically(path, write)
        except NonFiniteError as found:
            error = found
        except OSError as found:
            error = CheckpointError(
                f'{path} could not be written: {found}. The earlier '
                'checkpoints were not touched: make room on the disk, or give '
                'the folder the rights to write, and continue with --resume.'
            )
            error.__cause__ = found
        finally:
            self._saved = {}
            self._memories = []
        raise_together(error)
        meta = kwargs.get('meta') or {}
        if whole and {'epoch', 'iter'} <= meta.keys():
            self._preemption.complete = meta['epoch'], meta['iter'], path
        if whole and not filename.startswith('best_'):
            self.finite_checkpoint = path

    def _gather(self, memory: dict[str, Any]) -> list[dict[str, Any]]:
        """Give what each process remembers to the first one.

        It may be large (images, gradients), and stays in the host's memory.
        """
        if get_world_size() == 1:
            return [memory]
        if self._on_hosts is None:
            self._on_hosts = torch_dist.new_group(backend='gloo')
        return gather_object(memory, 0, self._on_hosts) or []

    # -- exact resuming ----------------------------------------------------

    def build_train_loop(self, loop: dict | BaseLoop) -> BaseLoop:
        """Build the training loop, and record its workers' random states."""
        if isinstance(loop, BaseLoop):
            return loop
        with explain_data_error(self.cfg, 'train'):
            built = super().build_train_loop(loop)
            check_images(built.dataloader.dataset)
        name_unreadable_images(built.dataloader.dataset)
        self._exact.watch(built)
        return built

    def build_val_loop(self, loop: dict | BaseLoop) -> BaseLoop:
        """Build the validation loop, with errors that name the data."""
        if isinstance(loop, BaseLoop):
            return loop
        with explain_data_error(self.cfg, 'val'):
            built = super().build_val_loop(loop)
            check_images(built.dataloader.dataset)
        name_unreadable_images(built.dataloader.dataset)
        if self.distiller is not None:
            check_validation(
                self.distiller.student,
                built.dataloader.dataset,
                self._classes,
                'val',
            )
        if self.unlabelled_stream is not None:
            say_leaks(self.unlabelled_stream, built.dataloader.dataset)
        return built

    def build_test_loop(self, loop: dict | BaseLoop) -> BaseLoop:
        """Build the test loop, with errors that name the data."""
        if isinstance(loop, BaseLoop):
            return loop
        with explain_data_error(self.cfg, 'test'):
            built = super().build_test_loop(loop)
            check_images(built.dataloader.dataset)
        name_unreadable_images(built.dataloader.dataset)
        return built

    def _find_resumed(self) -> None:
        """Find what to resume, and its seed, before anything is built."""
        if not self._resume:
            return
        if self._load_from is None:
            self._load_from = latest_checkpoint(
                self.work_dir, *checkpoint_folders(self.hooks)
            )
        if self._load_from is None:
            self.logger.warning(
                f'{self.work_dir} has no checkpoint to resume: the training '
                'starts from scratch'
            )
        elif '://' not in self._load_from:
            content = read_checkpoint(
                self._load_from,
                trust=trusts(self.cfg),
                opt_in=OPT_IN,
                lazily=True,
            )
            check_resumable(content, self._load_from)
            seed = content['meta'].get('seed')
            if seed is not None and self._randomness_cfg.get('seed') is None:
                # MMEngine would set it after the samplers have another one.
                self._randomness_cfg.update(seed=seed)
                self.set_randomness(**self._randomness_cfg)

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Resume, and continue the interrupted run's random numbers.

        Raises:
            CheckpointError: If the checkpoint is damaged, or was saved with
                other methods or another optimiser.
        """
        try:
            super().resume(filename, *args, **kwargs)
        except ValueError as error:
            if 'parameter group' not in str(error):
                raise
            raise CheckpointError(
                f'the parameters that were trained when {filename} was saved '
                f'differ from those of the config: {error}. Resume with the '
                'config it was saved with, or start from its weights with '
                'load_from and without resume.'
            ) from error
        self._exact.resume(self, self._random_states, self._memories)
        self._memories = []
        if isinstance(self.log_processor, TrainingLog):
            self.log_processor.start(self)
        self._say_what_differs(filename)
        if self.distiller is not None:
            steps = self.iter if self._steps is None else self._steps
            self.distiller.steps = steps
        if self.unlabelled_stream is not None:
            self.unlabelled_stream.taken = self._taken

    def _say_what_differs(self, filename: str) -> None:
        """Warn if the run goes on with another teacher, option or code."""
        saved, self._made_with = self._made_with, {}
        if saved and self._provenance is not None:
            found = differences(saved, self._provenance.facts())
            if found:
                self.logger.warning(
                    f'{filename} was saved by a run that was made with '
                    'something else, and what follows is made with what this '
                    f'run has (old → new): {described(found)}.'
                )


def runner_class(cfg: Config) -> Any:
    """Return the runner that a config names, or else MMEngine's.

    Raises:
        ConfigError: If there is no such runner.
    """
    kind = cfg.get('runner_type') or Runner
    return find_class(RUNNERS, kind, 'runner_type')


def check_runner(cfg: Config, source: str) -> None:
    """Refuse a runner that would train without the distillation.

    Args:
        cfg: The config.
        source: What it is called in the message.

    Raises:
        ConfigError: If the config has ``distillation``, and its runner is
            not derived from :class:`DistillationRunner`, or if it asks for
            mixed precision without a GPU.
    """
    check_mixed_precision(cfg)
    kind = runner_class(cfg)
    if not cfg.get('distillation') or issubclass(kind, DistillationRunner):
        return
    raise ConfigError(
        f'{source} has `distillation`, but not the runner that distils: '
        f'{kind.__name__} would train without it. Set '
        "runner_type='mmkd.DistillationRunner', or a class that is derived "
        'from it.'
    )


def _described(distiller: Distiller) -> str:
    """Describe in one line of the log what is distilled."""

    def sized(model: nn.Module) -> str:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return f'{type(model).__name__}, {trained:,} weights'

    methods = ', '.join(distiller.methods) or 'no methods'
    text = f'Training the student ({sized(distiller.student)}) with {methods}'
    if distiller.peers:
        peers = (
            f'{name} ({sized(peer.model)})'
            for name, peer in distiller.peers.items()
        )
        text += f'; peers: {", ".join(peers)}'
    for label, teacher in distiller.teacher.each().items():
        text += f'; the {log_name(label)} is {teacher.describe()}'
    return text
