"""Make a resumed run equal to the uninterrupted one, bit for bit."""

from typing import Any

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import (
    BaseLoop,
    EpochBasedTrainLoop,
    IterBasedTrainLoop,
    Runner,
)
from torch.utils.data import DataLoader

from . import random_state


class ExactResumeHook(Hook):
    """Record all random states in checkpoints, and continue from them.

    A checkpoint is written before the validation that follows it. A resumed
    run therefore begins with this validation: its result belongs to the run,
    and may be the best.

    A loader draws a number from PyTorch's global generator whenever it
    starts. A loader that the interrupted run had already started must not
    draw it again.
    """

    priority = 'LOWEST'

    def __init__(self) -> None:
        self._workers: random_state.WorkerStates | None = None
        self._resumed: dict[str, Any] | None = None
        self._validating = False

    def watch(self, loop: BaseLoop) -> None:
        """Start to record the random states of a training loop's workers."""
        endless = isinstance(loop, IterBasedTrainLoop)
        loader = loop.dataloader
        if loader.num_workers and (endless or loader.persistent_workers):
            self._workers = random_state.WorkerStates(loader, endless=endless)

    def capture(self, runner: Runner) -> dict[str, Any]:
        """Return the random states of this process, to be saved."""
        val_loader = getattr(runner._val_loop, 'dataloader', None)
        return {
            **random_state.capture(),
            'workers': self._workers.read() if self._workers else None,
            'loading': _loading(runner.train_dataloader),
            'validated': self._validating,
            'val_started': _draws_no_more(val_loader),
        }

    def resume(
        self, runner: Runner, saved: list[dict[str, Any]] | None
    ) -> None:
        """Continue from the random states of a checkpoint.

        A warning says why, if the resumed run will not be exact.

        Args:
            runner: The runner, which has loaded the checkpoint.
            saved: The states of each process; None or empty if the checkpoint
                has none.
        """
        gaps = _gaps(runner, saved)
        if gaps:
            runner.logger.warning(
                'The resumed run will not equal the uninterrupted one bit for '
                'bit: '
                f'{"; ".join(gaps)}.'
            )
        if not saved or len(saved) != get_world_size():
            return
        self._resumed = saved[get_rank()]
        workers = self._resumed['workers']
        if (
            self._workers
            and workers
            and len(workers) == len(self._workers.rows)
        ):
            self._workers.initial = workers

    def before_train(self, runner: Runner) -> None:
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
        if isinstance(loop, IterBasedTrainLoop) or self._workers:
            loop.dataloader.generator = torch.Generator()

    def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        if self._workers:
            self._workers.taken += 1
            self._workers.initial = None
        if self._resumed is not None:
            self._resumed = None
            runner.train_dataloader.generator = None

    def before_val(self, runner: Runner) -> None:
        self._validating = True

    def after_val(self, runner: Runner) -> None:
        self._validating = False


def _draws_no_more(loader: DataLoader | None) -> bool:
    """Return whether a loader keeps its workers and has started them."""
    return (
        isinstance(loader, DataLoader)
        and loader.persistent_workers
        and (loader._iterator is not None or loader.generator is not None)
    )


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


def _gaps(runner: Runner, saved: list[dict[str, Any]] | None) -> list[str]:
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
        if loop.iter != loop.epoch * len(loader):
            gaps.append(
                'the checkpoint was saved within an epoch, which starts again'
            )
    elif not _skips_exactly(loop):
        gaps.append(
            'this loader cannot skip what was trained on without loading it; '
            "use sampler=dict(type='InfiniteSampler') and no batch_sampler, "
            'or num_workers=0'
        )
    if any(hasattr(t, 'results_cache') for t in _transforms(loader.dataset)):
        gaps.append('a transform keeps a cache of images, which is not saved')
    return gaps


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


def _transforms(dataset: Any) -> list[Any]:
    """Return the transforms of a data set and of those that it wraps."""
    pipeline = getattr(dataset, 'pipeline', ())
    found = list(getattr(pipeline, 'transforms', pipeline))
    inner = [getattr(dataset, 'dataset', None)]
    for each in (*inner, *getattr(dataset, 'datasets', ())):
        if each is not None:
            found += _transforms(each)
    return found
