"""Make a resumed run equal to the uninterrupted one, bit for bit."""

import copy
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import (
    CheckpointHook,
    EMAHook,
    Hook,
    IterTimerHook,
    LoggerHook,
    ProfilerHook,
    RuntimeInfoHook,
)
from mmengine.model import is_model_wrapper
from mmengine.runner import (
    BaseLoop,
    EpochBasedTrainLoop,
    IterBasedTrainLoop,
    Runner,
)
from mmengine.utils import is_method_overridden
from torch import nn
from torch.utils.data import DataLoader

from mmkd.core.reach import optimizers_of

from . import random_state
from .encoding import decode, encode
from .epochs import SAMPLERS, Epochs, can_skip, draws_no_more
from .hooks import ProgressHook
from .preemption import PreemptionHook
from .python_state import Changes, PythonState

NO_MEMORY = (
    *(CheckpointHook, IterTimerHook, LoggerHook, ProfilerHook),
    *(ProgressHook, RuntimeInfoHook, PreemptionHook),
)
"""Hooks of which no attribute is saved: they remember times and the paths of
this run, and MMEngine resumes the best scores and checkpoints itself."""
LOST_GRADIENT = 'gradient of some iterations is lost'
"""MMEngine's words when a run resumes between two optimiser steps."""


class ExactResumeHook(Hook):
    """Record in checkpoints what MMEngine does not, and continue from it.

    That is all random states; what modules, transforms and hooks remember in
    plain attributes (:mod:`mmkd.engine.python_state`); and the gradients of an
    optimiser step that is not complete, where several batches make a step.

    A checkpoint is written before the validation that follows it. A resumed
    run therefore begins with this validation: its result belongs to the run,
    and may be the best.

    A checkpoint from within an epoch continues there (:class:`Epochs`).

    A loader draws a number from PyTorch's global generator whenever it
    starts. A loader that the interrupted run had already started must not
    draw it again.
    """

    priority = 'LOWEST'

    def __init__(self) -> None:
        self._workers: random_state.WorkerStates | None = None
        self._epochs: Epochs | None = None
        self._undo: Callable[[], None] | None = None
        self._resumed: dict[str, Any] | None = None
        self._recalled: dict[str, Any] = {}
        self._state: PythonState | None = None
        self._told: set[str] = set()
        self._validating = False
        self._before_val: dict[str, Any] | None = None
        self._forgotten: dict[str, Any] = {}

    def watch(self, loop: BaseLoop) -> None:
        """Start to record the random states of a training loop's workers."""
        endless = isinstance(loop, IterBasedTrainLoop)
        loader = loop.dataloader
        if loader.num_workers:
            self._workers = random_state.WorkerStates(loader, endless=endless)
        if _is_stock(loop):
            self._epochs = Epochs(loop, self._workers)

    def capture(self, runner: Runner) -> dict[str, Any]:
        """Return the random states of this process, to be saved."""
        val_loader = getattr(runner._val_loop, 'dataloader', None)
        epochs, workers = self._epochs, self._workers
        within = {'within': epochs.capture()} if epochs else {}
        if not any(within.values()) and not self._keeps_workers(runner):
            workers = None  # the next epoch has others
        return {
            **random_state.capture(),
            **within,
            'workers': workers.read() if workers else None,
            'loading': _loading(runner.train_dataloader),
            'validated': self._validating,
            'val_started': draws_no_more(val_loader),
            **self._forgotten,
        }

    def _keeps_workers(self, runner: Runner) -> bool:
        """Return whether the workers go on after an epoch."""
        loop = runner.train_loop
        return (
            isinstance(loop, IterBasedTrainLoop)
            or loop.dataloader.persistent_workers
        )

    def remember(self, runner: Runner) -> dict[str, Any]:
        """Return what this process remembers, to be saved.

        One warning names what has changed and cannot be saved.
        """
        if self._state is None:  # somebody saves without training
            return {}
        changes, workers = self._state.changes(), []
        within = self._epochs is not None and self._epochs.trained is not None
        if self._epochs is not None and within:
            # Its samplers start again from what they were when it began.
            changes = _with_samplers(changes, self._epochs.changes)
        if self._workers and (within or self._keeps_workers(runner)):
            workers = self._workers.memories()
        lost = [
            *changes.lost,
            *(f'{name} (in a worker of the data loader)' for name in workers),
            *_behind(runner, {each[0] for each in changes.saved}),
        ]
        if not self._told.issuperset(lost):
            self._told.update(lost)
            runner.logger.warning(
                'A run that is resumed from this checkpoint will not equal '
                'this one bit for bit, because this has changed during the '
                f'training and cannot be saved: {", ".join(lost)}.'
            )
        return {
            'attributes': changes.saved,
            'lost': lost,
            'gradients': {
                name: encode(parameter.grad, _refuse)
                for name, parameter in _optimized(runner).items()
                if parameter.grad is not None and parameter.grad.any()
            },
            'stopped': bool(getattr(runner.train_loop, 'stop_training', 0)),
        }

    def resume(
        self,
        runner: Runner,
        saved: list[dict[str, Any]] | None,
        memories: list[dict[str, Any]] | None = None,
    ) -> None:
        """Continue from the random states and memories of a checkpoint.

        A warning says why, if the resumed run will not be exact.

        Args:
            runner: The runner, which has loaded the checkpoint.
            saved: The states of each process; None or empty if the checkpoint
                has none.
            memories: What each process remembers; None or empty likewise.
        """
        gaps = _gaps(runner, saved, memories)
        if gaps:
            runner.logger.warning(
                'The resumed run will not equal the uninterrupted one bit for '
                'bit: '
                f'{"; ".join(gaps)}.'
            )
        same = len(saved or ()) == get_world_size()
        if memories:
            self._recalled = memories[get_rank()] if same else memories[0]
        if not same:
            self._recalled = _of_any_process(self._recalled)
        if self._recalled.get('gradients'):
            runner.logger.addFilter(_claims_no_loss)
        if not saved or not same:
            return
        self._resumed = saved[get_rank()]
        workers = self._resumed['workers']
        if (
            self._workers
            and workers
            and len(workers) == len(self._workers.rows)
        ):
            self._workers.initial = workers
        within = self._resumed.get('within')
        if self._epochs is not None and _continues(self._epochs.loop, within):
            self._epochs.resumed, self._epochs.now = within, self._resumed

    def before_train(self, runner: Runner) -> None:
        self._forgotten = {}
        runner.logger.removeFilter(_claims_no_loss)
        hooks = _hooks(runner)
        switches = any(hasattr(h, 'switch_pipeline') for h in hooks.values())
        self._state = PythonState(
            {'model': _model(runner)},
            {**_data(runner), **hooks, 'optim_wrapper': runner.optim_wrapper},
            replaced=('data.pipeline',) * switches,
        )
        if self._epochs is not None and can_skip(runner.train_dataloader):
            self._epochs.watch(runner.train_dataloader)
        within = self._epochs is not None and self._epochs.resumed is not None
        if within:
            self._undo = _undoing(runner)
        elif self._recalled:
            self._recall(runner, self._state)
        if self._resumed is None:
            return
        random_state.restore(self._resumed)
        loop = runner.train_loop
        if runner.val_loop is not None:
            if self._resumed['val_started']:
                runner.val_loop.dataloader.generator = torch.Generator()
            if not self._resumed['validated'] and _validation_due(loop):
                runner.logger.info(
                    'The validation that follows the checkpoint is run again'
                )
                runner.val_loop.run()
        if self._keeps_workers(runner) and not within:
            loop.dataloader.generator = torch.Generator()

    def before_train_epoch(self, runner: Runner) -> None:
        """Go on within an epoch.

        What hooks do when an epoch begins, they have done before the
        checkpoint was saved, and it holds what came of it. They do it again
        for what no checkpoint holds (times, open files); the rest is undone.
        """
        if self._undo is not None:
            self._undo()
            self._undo = None
            if self._recalled and self._state is not None:
                self._recall(runner, self._state)

    def _recall(self, runner: Runner, state: PythonState) -> None:
        """Let everything remember what it did when it was saved."""
        memory, self._recalled = self._recalled, {}
        saved = memory['attributes']
        for name, hook in _hooks(runner).items():
            if (
                hasattr(hook, 'switch_pipeline')
                and not getattr(hook, '_has_switched', False)
                and [name, 'attribute', '_has_switched', True] in saved
            ):
                hook.before_train_epoch(runner)  # it switches again
        parameters = _optimized(runner)
        device = next(_model(runner).parameters()).device
        missing = state.restore(saved, device)
        for name, encoded in memory['gradients'].items():
            if name in parameters:
                gradient = decode(encoded, _refuse, device=device)
                parameters[name].grad = gradient
            else:
                missing.append(f'the gradient of {name}')
        if memory['stopped']:
            runner.train_loop.stop_training = True
        if missing:
            runner.logger.warning(
                'The resumed run will not equal the uninterrupted one bit for '
                'bit: the checkpoint holds a memory of what this run does not '
                f'have, or has in another form: {", ".join(missing)}.'
            )

    def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        if self._epochs is not None and self._epochs.draws:
            self._epochs.draws = False
            runner.logger.warning(
                'The resumed run will not equal the uninterrupted one bit for '
                'bit: the sampler of the data loader draws from the global '
                'random numbers while it runs, and in what order the '
                'interrupted run drew them is not known.'
            )
        if self._workers:
            self._workers.taken += 1
            self._workers.initial = None
        if self._resumed is not None:
            self._resumed = None
            runner.train_dataloader.generator = None

    def before_val(self, runner: Runner) -> None:
        self._validating = True
        loader = getattr(runner.val_loop, 'dataloader', None)
        self._before_val = {
            **random_state.capture(),
            'validated': False,
            'val_started': draws_no_more(loader),
        }

    def after_val(self, runner: Runner) -> None:
        self._validating = False

    def forget_validation(self) -> None:
        """Save what was there before the validation that is broken off."""
        self._forgotten = self._before_val or {}


def _validation_due(loop: BaseLoop) -> bool:
    """Return whether the training loop validates where it is now."""
    if isinstance(loop, EpochBasedTrainLoop):
        done, last = loop.epoch, loop.max_epochs
        if loop.iter != done * len(loop.dataloader):
            return False  # within an epoch
    elif isinstance(loop, IterBasedTrainLoop):
        done, last = loop.iter, loop.max_iters
    else:
        return False
    loop._decide_current_val_interval()
    return done >= max(loop.val_begin, 1) and (
        done % loop.val_interval == 0 or done == last
    )


def _loading(loader: DataLoader) -> list[int]:
    return [loader.num_workers, int(loader.persistent_workers)]


def _gaps(
    runner: Runner,
    saved: list[dict[str, Any]] | None,
    memories: list[dict[str, Any]] | None,
) -> list[str]:
    """Return the reasons why a resumed run will not be exact."""
    if not saved:
        return ['the checkpoint holds no random states']
    if len(saved) != get_world_size():
        return [f'it was saved by {len(saved)} processes']
    loop, gaps = runner.train_loop, []
    loader = loop.dataloader
    if saved[0]['loading'] != _loading(loader):
        gaps.append(
            'the checkpoint was saved with another num_workers or '
            'persistent_workers of train_dataloader'
        )
    if isinstance(loop, EpochBasedTrainLoop):
        within = saved[0].get('within')
        if within is None and 'within' in saved[0]:
            pass
        elif not _continues(loop, within) and (
            within or loop.iter != loop.epoch * len(loader)
        ):
            gaps.append(
                'the checkpoint was saved within an epoch, which starts again'
                f'{_why(loop, within)}'
            )
    elif not _skips_exactly(loop):
        gaps.append(
            'this loader cannot skip what was trained on without loading it; '
            "use sampler=dict(type='InfiniteSampler') and no batch_sampler, "
            'or num_workers=0'
        )
    if not memories or not memories[get_rank()]:
        gaps.append(
            'the checkpoint does not hold what modules, transforms and hooks '
            'remember, because it comes from an earlier version of mmkd or '
            'was saved without the optimiser'
        )
    elif memories[get_rank()]['lost']:
        lost = ', '.join(memories[get_rank()]['lost'])
        gaps.append(f'what could not be saved is lost: {lost}')
    return gaps


def _is_stock(loop: BaseLoop) -> bool:
    """Return whether a loop trains an epoch as MMEngine does."""
    return (
        isinstance(loop, EpochBasedTrainLoop)
        and type(loop).run_epoch is EpochBasedTrainLoop.run_epoch
    )


def _continues(loop: BaseLoop, within: dict[str, Any] | None) -> bool:
    """Return whether a loop goes on within an epoch."""
    return within is not None and not _why(loop, within)


def _why(loop: BaseLoop, within: dict[str, Any] | None) -> str:
    """Return why a loop does not go on within an epoch."""
    loader = loop.dataloader
    if not _is_stock(loop):
        return f', because {type(loop).__name__} has its own run_epoch'
    if not can_skip(loader):
        return ', because the data loader has no batch sampler'
    if within is None or within['epoch'] != loop.epoch:
        return ', because it does not say where in the epoch it was saved'
    if within['length'] != len(loader):
        return (
            f', because it had {within["length"]} batches and now has '
            f'{len(loader)}'
        )
    return ''


def _with_samplers(changes: Changes, begun: Changes) -> Changes:
    """Replace the changes of samplers by those when the epoch began."""

    def own(place: str) -> bool:
        return place.partition('.')[0] in SAMPLERS

    return Changes(
        [each for each in changes.saved if not own(each[0])]
        + [each for each in begun.saved if own(each[0])],
        [each for each in changes.lost if not own(each)]
        + [each for each in begun.lost if own(each)],
    )


def _undoing(runner: Runner) -> Callable[[], None]:
    """Return what puts weights, optimiser and logs back as they are now."""
    averages = [h.ema_model for h in runner.hooks if isinstance(h, EMAHook)]
    tensors = [
        (tensor, tensor.detach().cpu().clone())
        for model in (_model(runner), *averages)
        for tensor in (*model.parameters(), *model.buffers())
    ]
    optimizer = copy.deepcopy(runner.optim_wrapper.state_dict())
    hub = runner.message_hub.state_dict()

    def undo() -> None:
        with torch.no_grad():
            for tensor, old in tensors:
                tensor.copy_(old)
        runner.optim_wrapper.load_state_dict(optimizer)
        runner.message_hub.load_state_dict(hub)

    return undo


def _skips_exactly(loop: BaseLoop) -> bool:
    """Return whether a loop by iterations continues its loader exactly."""
    loader = loop.dataloader
    return (
        isinstance(loop, IterBasedTrainLoop)
        and not getattr(loop, 'fast_forward_on_resume', False)
        and hasattr(loop.dataloader_iterator, 'skip_iter')
        and (
            loader.num_workers == 0
            or (
                loader.batch_size is not None
                and hasattr(loader.sampler, 'skip')
            )
        )
    )


def _model(runner: Runner) -> nn.Module:
    wrapped = is_model_wrapper(runner.model)
    return runner.model.module if wrapped else runner.model


def _hooks(runner: Runner) -> dict[str, Hook]:
    """Return the hooks whose attributes are saved, by names."""
    return _named(
        'hooks',
        (
            hook
            for hook in runner.hooks
            if not isinstance(hook, (*NO_MEMORY, ExactResumeHook))
        ),
    )


def _behind(runner: Runner, changed: set[str]) -> list[str]:
    """Return hooks with a memory that act after the checkpoint is saved.

    What they do after the iteration or epoch that a checkpoint ends is not in
    it. After a validation the checkpoint is saved when all hooks have acted.
    """
    found, behind = [], False
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            behind = True
            unit = 'epoch' if hook.by_epoch else 'iter'
            events = f'after_train_{unit}', f'_after_{unit}'
            names = {id(each): name for name, each in _hooks(runner).items()}
        elif behind and any(
            is_method_overridden(event, Hook, hook) for event in events
        ):
            name = names.get(id(hook))
            if name in changed:
                found.append(
                    f'{name} (acts after the checkpoint hook; give it a '
                    'higher priority, such as LOW)'
                )
    return found


def _data(runner: Runner) -> dict[str, Any]:
    """Return what decides which data comes next, and what judges it."""
    loader = runner.train_dataloader
    found = {'data': loader.dataset}
    if isinstance(runner.train_loop, EpochBasedTrainLoop):
        # A loop by iterations moves its sampler to where it was by itself.
        found.update(
            sampler=loader.sampler, batch_sampler=loader.batch_sampler
        )
    evaluator = getattr(runner._val_loop, 'evaluator', None)
    return {**found, **_named('metrics', getattr(evaluator, 'metrics', ()))}


def _named(kind: str, objects: Iterable[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for each in objects:
        name = f'{kind}.{type(each).__name__}'
        count = sum(key.partition('#')[0] == name for key in found)
        found[f'{name}#{count + 1}' if count else name] = each
    return found


def _of_any_process(memory: dict[str, Any]) -> dict[str, Any]:
    """Return what does not depend on the data of the process."""
    own = ('data', 'sampler', 'batch_sampler')
    attributes = [
        each
        for each in memory.get('attributes', ())
        if each[0].partition('.')[0] not in own
    ]
    return memory and {**memory, 'attributes': attributes, 'gradients': {}}


def _optimized(runner: Runner) -> dict[str, nn.Parameter]:
    """Return the parameters that the optimiser updates, by name."""
    updated = {
        id(parameter)
        for optimizer in optimizers_of(runner.optim_wrapper)
        for group in optimizer.param_groups
        for parameter in group['params']
    }
    named = _model(runner).named_parameters()
    return {name: each for name, each in named if id(each) in updated}


def _refuse(value: Any) -> Any:
    raise TypeError(f'{type(value).__name__} is no gradient')


def _claims_no_loss(record: logging.LogRecord) -> bool:
    """Filter MMEngine's warning of lost gradients: they are restored."""
    return LOST_GRADIENT not in record.getMessage()
