"""The runner that distils: MMEngine's, with a Distiller while it trains."""

import copy
import difflib
import os
import os.path as osp
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from mmengine.dist import all_gather_object, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop, Runner
from torch import nn

from mmkd.core.distiller import Distiller, build_distiller
from mmkd.data.checkpoint_file import (
    check_checkpoint,
    load_checkpoint_file,
    write_atomically,
)
from mmkd.errors import CheckpointError, ConfigError
from mmkd.peers.peer import (
    Peer,
    add_to_optimizer,
    check_trained,
    save_peers,
    with_trained_teacher,
)
from mmkd.registry import HOOKS, RUNNERS
from mmkd.teachers.several import log_name
from mmkd.utils import ATTACHED, build_checked

from .checkpoint import join_checkpoint, latest_checkpoint, split_checkpoint
from .data_guard import check_images, explain_data_error
from .hooks import LossCheckHook, PeerValidationHook, ProgressHook
from .resume import ExactResumeHook


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
    * resumes exactly: it restores all random states, those of the loader's
      workers too, and repeats the validation that follows a checkpoint;
    * starts distributed training on machines without a GPU as well (gloo).

    Without ``distillation`` it is MMEngine's runner with these four additions.

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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._exact = ExactResumeHook()
        self._random_states: list[dict[str, Any]] = []
        self._steps: int | None = None
        self._saved: dict[str, Any] = {}
        super().__init__(*args, **kwargs)
        self.register_hook(self._exact)
        self._check_distillation_key()
        if self.cfg.get('distillation'):
            self.cfg.distillation = with_trained_teacher(self.cfg.distillation)

    def train(self) -> nn.Module:
        """Attach the distiller, train, and leave the stock student."""
        try:
            self._find_resumed()
            self._attach()
            self._wrap()
            self._register_once(ProgressHook)
            return super().train()
        finally:
            self._detach()
            for hook in self.hooks:
                if isinstance(hook, ProgressHook):
                    hook.close()

    def val(self) -> dict:
        """Validate the stock student."""
        self._wrap()
        return super().val()

    def test(self) -> dict:
        """Test the stock student."""
        self._wrap()
        return super().test()

    # -- attaching ---------------------------------------------------------

    def _attach(self) -> None:
        cfg = self.cfg.get('distillation')
        if cfg is None or self._train_loop is None:
            self.logger.info(
                'The config has no `distillation`: this is plain training'
            )
            return
        classes = self.train_loop.dataloader.dataset.metainfo.get('classes')
        if not classes:
            raise ConfigError(
                'the training data set names no classes; set '
                'metainfo=dict(classes=(...)) on it.'
            )
        self.model = self._student()
        self.distiller = build_distiller(
            cfg, self.model, classes, self.seed or 0
        )
        self.logger.info(_described(self.distiller))
        self.distiller.epoch_length = len(self.train_loop.dataloader)
        self.distiller.attach()
        self._register_once(LossCheckHook)
        if self._peers:
            self._register_once(PeerValidationHook)

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

    def register_hook(self, hook: Hook | dict, priority: Any = None) -> None:
        """Register a hook; check the options of mmkd's own hooks."""
        name = str(hook.get('type')) if isinstance(hook, dict) else ''
        if name.startswith('mmkd.'):
            options = dict(hook)
            own = options.pop('priority', None)
            priority = own if priority is None else priority
            hook = build_checked(HOOKS, options, 'custom_hooks')
        super().register_hook(hook, priority)

    def _register_once(self, hook: type[Hook]) -> None:
        if not any(isinstance(each, hook) for each in self.hooks):
            self.register_hook(hook())

    def _check_distillation_key(self) -> None:
        if 'distillation' in self.cfg:
            return
        names = {str(name).lower(): name for name in self.cfg}
        close = difflib.get_close_matches(
            'distillation', names, n=1, cutoff=0.65
        )
        if close:
            raise ConfigError(
                f'the config has "{names[close[0]]}" where "distillation" is '
                'expected; rename it.'
            )

    def _init_model_weights(self) -> None:
        """Initialise only the student: the adapters already have weights."""
        student = self._student()
        attached = student._modules.pop(ATTACHED, None)
        try:
            super()._init_model_weights()
        finally:
            if attached is not None:
                student._modules[ATTACHED] = attached

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
        """Build the optimiser, with the peers' parameters and settings."""
        if self.distiller is None or not self._peers:
            return super().build_optim_wrapper(optim_wrapper)
        if isinstance(optim_wrapper, OptimWrapper):
            check_trained(optim_wrapper, self._peers)
            return optim_wrapper
        modules = self.distiller._modules
        peers = modules.pop('peers')
        try:
            wrapper = super().build_optim_wrapper(optim_wrapper)
        finally:
            modules['peers'] = peers
        add_to_optimizer(
            wrapper,
            self._peers,
            self.cfg.optim_wrapper,
            adapters=self.distiller.methods.parameters(),
        )
        return wrapper

    @property
    def _peers(self) -> dict[str, Peer]:
        return {} if self.distiller is None else dict(self.distiller.peers)

    # -- checkpoints -------------------------------------------------------

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Register MMEngine's default hooks, with a safer checkpoint hook."""
        hooks = dict(hooks or {})
        checkpoint = hooks.get('checkpoint', dict(type='CheckpointHook'))
        if isinstance(checkpoint, dict) and checkpoint['type'] in (
            'CheckpointHook',
            'mmengine.CheckpointHook',
        ):
            hooks['checkpoint'] = {
                'interval': 1,
                **checkpoint,
                'type': 'mmkd.SafeCheckpointHook',
            }
        super().register_default_hooks(hooks)

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call the hooks; convert checkpoints between file and memory.

        In a file ``state_dict`` is stock; in memory it also holds the weights
        of the distillation.
        """
        if fn_name == 'after_load_checkpoint' and self._attached is not None:
            own = self._attached.state_dict(prefix=f'{ATTACHED}.')
            join_checkpoint(kwargs['checkpoint'], own, resume=self._resume)
        super().call_hook(fn_name, **kwargs)
        if fn_name == 'before_save_checkpoint':
            checkpoint = kwargs['checkpoint']
            split_checkpoint(checkpoint)
            checkpoint[ATTACHED]['random_states'] = self._random_states
            if self.distiller is not None:
                checkpoint[ATTACHED]['steps'] = self.distiller.steps
            self._saved = checkpoint

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> Any:
        """Load weights; see :meth:`Runner.load_checkpoint`.

        Raises:
            CheckpointError: If the file is missing or truncated.
        """
        check_checkpoint(filename)
        checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        attached = checkpoint.get(ATTACHED, {})
        self._random_states = attached.get('random_states', [])
        self._steps = attached.get('steps')
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
        save = super().save_checkpoint
        if '://' in out_dir or not is_main_process():
            save(out_dir, filename, *args, **kwargs)
            return
        path = osp.join(out_dir, filename)
        try:
            os.makedirs(out_dir, exist_ok=True)
            write_atomically(
                path,
                lambda path: save(
                    out_dir, osp.basename(path), *args, **kwargs
                ),
            )
            save_peers(out_dir, filename, self._peers, self._saved)
        except OSError as error:
            raise CheckpointError(
                f'{path} could not be written: {error}. The earlier '
                'checkpoints are intact: make room on the disk, or give the '
                'folder the rights to write, and continue with --resume.'
            ) from error
        finally:
            self._saved = {}

    # -- exact resuming ----------------------------------------------------

    def build_train_loop(self, loop: dict | BaseLoop) -> BaseLoop:
        """Build the training loop, and record its workers' random states."""
        if isinstance(loop, BaseLoop):
            return loop
        with explain_data_error(self.cfg, 'train'):
            built = super().build_train_loop(loop)
            check_images(built.dataloader.dataset)
        self._exact.watch(built)
        return built

    def build_val_loop(self, loop: dict | BaseLoop) -> BaseLoop:
        """Build the validation loop, with errors that name the data."""
        with explain_data_error(self.cfg, 'val'):
            built = super().build_val_loop(loop)
            check_images(built.dataloader.dataset)
        return built

    def build_test_loop(self, loop: dict | BaseLoop) -> BaseLoop:
        """Build the test loop, with errors that name the data."""
        with explain_data_error(self.cfg, 'test'):
            built = super().build_test_loop(loop)
            check_images(built.dataloader.dataset)
        return built

    def _find_resumed(self) -> None:
        """Find what to resume, and its seed, before anything is built."""
        if not self._resume:
            return
        if self._load_from is None:
            self._load_from = latest_checkpoint(self.work_dir)
        if self._load_from is None:
            self.logger.warning(
                f'{self.work_dir} has no checkpoint to resume: the training '
                'starts from scratch'
            )
        elif '://' not in self._load_from:
            meta = load_checkpoint_file(self._load_from, trust=True).get(
                'meta'
            )
            if not meta:
                raise CheckpointError(
                    f'{self._load_from} holds only weights, and no state of a '
                    'training to resume. Start from them with load_from and '
                    'without resume.'
                )
            seed = meta.get('seed')
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
        self._exact.resume(self, self._random_states)
        if self.distiller is not None:
            steps = self.iter if self._steps is None else self._steps
            self.distiller.steps = steps


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
