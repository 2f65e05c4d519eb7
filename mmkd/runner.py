"""The runner that distils: MMEngine's, with a Distiller while it trains."""

import copy
import difflib
import os
import os.path as osp
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as torch_dist
from mmengine.config import Config
from mmengine.dist import all_gather_object, get_rank, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from . import random_state
from .checkpoint import (
    ATTACHED,
    join_checkpoint,
    split_checkpoint,
    write_atomically,
)
from .data_guard import check_images, explain_data_error
from .distiller import Distiller, build_distiller
from .registry import RUNNERS
from .utils import ConfigError, isolated_random_state


@RUNNERS.register_module()
class DistillationRunner(Runner):
    """Trains ``model`` with ``distillation``, both of the config.

    The model is the stock student. :meth:`train` builds the teacher, the
    methods and their adapters and attaches them before the optimiser is
    built; :meth:`val` and :meth:`test` know nothing of them. Beside that it

    * keeps checkpoints stock (``distillation`` is a key of its own), writes
      them atomically and removes old ones only after the new one is whole;
    * resumes exactly: random states, of the loader's workers too, and the
      validation that follows a checkpoint, which is run again;
    * starts distributed training also on the CPU (gloo).

    Without ``distillation`` it is MMEngine's runner with the same three.

    Example:
        >>> config = Config.fromfile('configs/faster_rcnn_kd_r50.py')
        >>> config.work_dir = 'work_dirs/kd'
        >>> DistillationRunner.from_cfg(config).train()  # doctest: +SKIP
    """

    distiller: Distiller | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._resumed: list[torch.Tensor] | None = None
        self._random_states: list[torch.Tensor] = []
        self._worker_states: random_state.WorkerStates | None = None
        super().__init__(*args, **kwargs)
        self._check_distillation_key()

    def train(self) -> nn.Module:
        """Attach the distiller, train, and leave the stock student."""
        try:
            self._attach()
            self._wrap()
            return super().train()
        finally:
            if self.distiller is not None:
                self.distiller.detach()

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
        if cfg is None:
            self.logger.info('No `distillation` in the config: plain training')
            return
        classes = self.train_loop.dataloader.dataset.metainfo.get('classes')
        if not classes:
            raise ConfigError(
                'the training data set names no classes; set '
                'metainfo=dict(classes=(...)) on it.'
            )
        seed = self.seed or 0
        self.distiller = build_distiller(cfg, self.model, classes, seed)
        self.distiller.attach()
        teacher = self.distiller.teacher
        self.logger.info(
            f'Distilling {type(teacher.model).__name__} into '
            f'{type(self.model).__name__} with '
            f'{", ".join(self.distiller.methods)}; classes: '
            f"{teacher.class_map}; the teacher's normalisation "
            f'{"differs" if teacher.renormalize.needed else "is equal"}'
        )
        self.register_hook(
            dict(type='mmkd.LossCheckHook'), priority='VERY_LOW'
        )

    def _check_distillation_key(self) -> None:
        if 'distillation' in self.cfg:
            return
        close = difflib.get_close_matches(
            'distillation', list(self.cfg), n=1, cutoff=0.75
        )
        if close:
            raise ConfigError(
                f'the config has "{close[0]}" where "distillation" is '
                'expected; rename it.'
            )

    def _init_model_weights(self) -> None:
        """Initialise the student alone: adapters have their weights."""
        student = self.model.module if self._wrapped else self.model
        attached = student._modules.pop(ATTACHED, None)
        try:
            super()._init_model_weights()
        finally:
            if attached is not None:
                student._modules[ATTACHED] = attached

    # -- distributed start -------------------------------------------------

    def setup_env(self, env_cfg: dict) -> None:
        """Start the processes' group, on machines without GPU too."""
        if (
            self._launcher == 'pytorch'
            and not torch.cuda.is_available()
            and not torch_dist.is_initialized()
        ):
            # MMEngine selects a CUDA device before it asks for the backend.
            torch_dist.init_process_group('gloo')
        super().setup_env(env_cfg)

    @property
    def _wrapped(self) -> bool:
        return is_model_wrapper(self.model)

    def wrap_model(
        self, model_wrapper_cfg: dict | None, model: nn.Module
    ) -> nn.Module:
        """Move the model to its device; :meth:`_wrap` wraps it later.

        Adapters come before the wrapper, which must know every parameter.
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

    # -- checkpoints -------------------------------------------------------

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """MMEngine's default hooks, with a safer checkpoint hook."""
        hooks = copy.deepcopy(hooks or {})
        checkpoint = hooks.setdefault(
            'checkpoint', dict(type='CheckpointHook', interval=1)
        )
        if isinstance(checkpoint, dict) and checkpoint.get('type') in (
            'CheckpointHook',
            'mmengine.CheckpointHook',
        ):
            checkpoint['type'] = 'mmkd.SafeCheckpointHook'
        super().register_default_hooks(hooks)

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call the hooks; checkpoints are stock outside, joined within."""
        if fn_name == 'after_load_checkpoint':
            checkpoint = kwargs['checkpoint']
            join_checkpoint(checkpoint)
            self._resumed = checkpoint.get(ATTACHED, {}).get('random_states')
        super().call_hook(fn_name, **kwargs)
        if fn_name == 'before_save_checkpoint':
            checkpoint = kwargs['checkpoint']
            split_checkpoint(checkpoint)
            checkpoint[ATTACHED]['random_states'] = self._random_states

    def save_checkpoint(
        self, out_dir: str, filename: str, *args: Any, **kwargs: Any
    ) -> None:
        """Save whole or not at all; see :meth:`Runner.save_checkpoint`."""
        # Every process takes part here; MMEngine's method is the first's.
        states = all_gather_object(self._capture())
        self._random_states = [random_state.packed(s) for s in states]
        save = super().save_checkpoint
        if '://' in out_dir or not is_main_process():
            save(out_dir, filename, *args, **kwargs)
            return
        os.makedirs(out_dir, exist_ok=True)
        write_atomically(
            osp.join(out_dir, filename),
            lambda path: save(
                out_dir, osp.basename(path), *args, **kwargs
            ),
        )

    # -- exact resuming ----------------------------------------------------

    def build_train_loop(self, loop: dict | BaseLoop) -> BaseLoop:
        """Build the loop; its workers' random states are recorded."""
        if isinstance(loop, BaseLoop):
            return loop
        with explain_data_error(self.cfg, 'train_dataloader'):
            built = super().build_train_loop(loop)
            check_images(built.dataloader.dataset)
        loader = built.dataloader
        if (
            isinstance(built, EpochBasedTrainLoop)
            and loader.num_workers > 0
            and loader.persistent_workers
        ):
            self._worker_states = random_state.WorkerStates(loader)
        return built

    def build_val_loop(self, loop: dict | BaseLoop) -> BaseLoop:
        """Build the validation loop, with errors that name the data."""
        with explain_data_error(self.cfg, 'val_dataloader'):
            built = super().build_val_loop(loop)
            check_images(built.dataloader.dataset)
        return built

    def build_test_loop(self, loop: dict | BaseLoop) -> BaseLoop:
        """Build the test loop, with errors that name the data."""
        with explain_data_error(self.cfg, 'test_dataloader'):
            return super().build_test_loop(loop)

    def resume(self, *args: Any, **kwargs: Any) -> None:
        """Resume, and continue the interrupted run's random numbers."""
        super().resume(*args, **kwargs)
        states, self._resumed = self._resumed, None
        rank = get_rank()
        if not states or rank >= len(states):
            self.logger.warning(
                'The checkpoint holds no random states for this process: the '
                'resumed run is not the uninterrupted one bit for bit.'
            )
            return
        mine = random_state.unpacked(states[rank])
        if self._worker_states is not None:
            self._worker_states.initial = mine['workers']
        self.register_hook(
            _ContinueRandomStates(mine, persistent=bool(self._worker_states)),
            priority='LOWEST',
        )

    def _capture(self) -> dict[str, Any]:
        workers = self._worker_states
        return {
            **random_state.capture(),
            'workers': workers.read() if workers else None,
            'val_started': _has_started(self._val_loop),
        }


class _ContinueRandomStates(Hook):
    """Puts the resumed random states where the interrupted run had them.

    The checkpoint was written before its epoch's validation, which is run
    (again): its result belongs to the run, and it may draw numbers. Loaders
    with persistent workers draw one when they start, which the interrupted
    run had done earlier; that draw is undone.
    """

    def __init__(self, states: dict[str, Any], *, persistent: bool) -> None:
        self.states = states
        self.persistent = persistent
        self.pending = persistent

    def before_train(self, runner: Runner) -> None:
        random_state.restore(self.states)
        loop = runner.train_loop
        if runner.val_loop is not None and isinstance(
            loop, EpochBasedTrainLoop
        ):
            loop._decide_current_val_interval()
            due = loop.epoch >= loop.val_begin and (
                loop.epoch % loop.val_interval == 0
                or loop.epoch == loop.max_epochs
            )
            if due:
                runner.logger.info(
                    'The validation that follows the checkpoint is run again'
                )
                runner.val_loop.run()
            if due and self.states['val_started']:
                random_state.restore(self.states)
        self.states = random_state.capture()

    def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        if self.pending:
            random_state.restore(self.states)
            self.pending = False


def _has_started(loop: Any) -> bool:
    loader = getattr(loop, 'dataloader', None)
    return (
        isinstance(loader, DataLoader)
        and loader.persistent_workers
        and loader._iterator is not None
    )
