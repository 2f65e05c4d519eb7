"""Begin an epoch where a checkpoint from within it has left off.

MMEngine starts such an epoch again. Here the sampler starts again from what
it was at the beginning of the epoch, and the batches that were trained on are
skipped: their indices are drawn, their images are not loaded.
"""

from collections.abc import Iterator
from typing import Any

import torch
from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import DataLoader, IterableDataset

from . import random_state
from .python_state import Changes, PythonState
from .random_state import WorkerStates

SAMPLERS = ('sampler', 'batch_sampler')
"""The names of what decides which images come next."""


class Epochs:
    """The epochs of a loop by epochs.

    Args:
        loop: The loop, whose ``run_epoch`` is replaced.
        workers: The random states of the loader's workers, if it has any.

    Attributes:
        trained: The number of batches of this epoch that the training has
            taken; None between epochs.
        resumed: Where a checkpoint has left off, as :meth:`capture` returns
            it; the next epoch begins there.
        now: The random states of that checkpoint.
        draws: Whether the sampler draws from the global random numbers while
            it runs, so that what it gives next depends on the training.
    """

    def __init__(
        self, loop: EpochBasedTrainLoop, workers: WorkerStates | None
    ) -> None:
        self.loop, self.workers = loop, workers
        self.trained: int | None = None
        self.resumed: dict[str, Any] | None = None
        self.now: dict[str, Any] | None = None
        self.draws = False
        self.changes = Changes([], [])
        self._begin: dict[str, Any] = {}
        self._state: PythonState | None = None
        loop.run_epoch = self.run

    def watch(self, loader: DataLoader) -> None:
        """Compare the samplers from now on with what they are now."""
        self._state = PythonState(
            {},
            {name: getattr(loader, name) for name in SAMPLERS},
            outside={'data': loader.dataset},
        )

    def capture(self) -> dict[str, Any] | None:
        """Return where the epoch is, to be saved; None between epochs."""
        if self.trained is None:
            return None
        return {**self._begin, 'batches': self.trained}

    def run(self) -> None:
        """Train an epoch, or the rest of it."""
        loop, runner = self.loop, self.loop.runner
        runner.call_hook('before_train_epoch')
        runner.model.train()
        for index, batch in self._batches(loop.dataloader):
            self.trained = index + 1
            loop.run_iter(index, batch)
        self.trained = None
        runner.call_hook('after_train_epoch')
        loop._epoch += 1

    def _batches(self, loader: DataLoader) -> Iterator[tuple[int, Any]]:
        """Return the batches of the epoch, or its rest, with their numbers."""
        resumed, self.resumed = self.resumed, None
        if self._state is not None:
            self.changes = self._state.changes()
        self._begin = resumed or {
            'epoch': self.loop.epoch,
            'length': len(loader),
            'running': draws_no_more(loader),
            'began': random_state.capture(),
        }
        first = resumed['batches'] if resumed else 0
        if self.workers is not None:
            self.workers.begin(loader, first)
        batches = self._skipped(loader, first) if resumed else iter(loader)
        self.trained = first
        if self.workers is not None:
            self.workers.initial = None  # they have started
        yield from enumerate(batches, first)

    def _skipped(self, loader: DataLoader, first: int) -> Iterator[Any]:
        """Start a pass over a loader behind the batches trained on."""
        skipped = _Skipped(loader.batch_sampler, first, loader.num_workers)
        random_state.restore(self._begin['began'])
        if self._begin['running']:
            loader.generator = torch.Generator()
        try:
            return skipped.iterate(loader)
        finally:
            loader.generator = None
            self.draws = skipped.draws
            if self.now is not None:
                random_state.restore(self.now)


def draws_no_more(loader: DataLoader | None) -> bool:
    """Return whether a loader keeps its workers and has started them."""
    return (
        isinstance(loader, DataLoader)
        and loader.persistent_workers
        and (loader._iterator is not None or loader.generator is not None)
    )


def can_skip(loader: DataLoader) -> bool:
    """Return whether batches can be skipped without loading them."""
    return loader.batch_sampler is not None and not isinstance(
        loader.dataset, IterableDataset
    )


class _Skipped:
    """A batch sampler whose next pass begins after some batches.

    Each worker of a loader continues with the batches whose turn it was:
    those before it are given an empty batch, which is no batch.
    """

    def __init__(self, sampler: Any, batches: int = 0, workers: int = 0):
        self.sampler, self.batches = sampler, batches
        self.empty = batches % workers if workers else 0
        self.draws = False
        self._indices: Iterator[Any] = iter(())

    def iterate(self, loader: DataLoader) -> Iterator[Any]:
        """Start a pass over a loader that has this sampler otherwise."""
        # A loader refuses to set it, and keeps it for its further passes.
        vars(loader)['batch_sampler'] = self
        try:
            iterator = iter(loader)
        finally:
            vars(loader)['batch_sampler'] = self.sampler
        self._skip()
        for _ in range(self.empty):
            next(iterator)
        self.empty = 0
        return iterator

    def __iter__(self) -> Iterator[Any]:
        self._indices = iter(self.sampler)
        return self._pass(self._indices)

    def __len__(self) -> int:
        return len(self.sampler)

    def _pass(self, indices: Iterator[Any]) -> Iterator[Any]:
        self._skip()
        yield from [[]] * self.empty
        yield from indices

    def _skip(self) -> None:
        """Draw the indices of what is skipped, once.

        The first may set up the sampler's own generator.
        """
        batches, self.batches = self.batches, 0
        if batches:
            next(self._indices, None)
            states = random_state.capture()
            for _ in range(batches - 1):
                next(self._indices, None)
            self.draws = states != random_state.capture()
