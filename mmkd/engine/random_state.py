"""Random states of the training process and of its data-loading workers.

MMEngine resumes weights and optimisers, but not random numbers: after a
resume, the samplers of two-stage detectors and the augmentations draw other
numbers than the uninterrupted run. With these states they draw the same.
"""

import pickle
import random
import time
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from .python_state import PythonState

ROW_BYTES = 16384
"""Enough for the pickled states of one worker (about 10,700 bytes)."""
NOTE_BYTES = 1024
"""For the names of what a worker remembers."""


def capture() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and PyTorch's generators.

    The states consist of numbers and bytes, so that a checkpoint can hold
    them and reading it runs no code.

    Example:
        >>> import random
        >>> from mmkd.engine.random_state import capture, restore
        >>> states = capture()
        >>> first = random.random()
        >>> restore(states)
        >>> random.random() == first
        True
    """
    name, keys, *rest = np.random.get_state(legacy=True)
    states = {
        'python': random.getstate(),
        'numpy': (name, np.asarray(keys).tobytes(), *rest),
        'torch': torch.get_rng_state().numpy().tobytes(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states['cuda'] = torch.cuda.get_rng_state().numpy().tobytes()
    return states


def restore(states: dict[str, Any]) -> None:
    """Set the global generators to states from :func:`capture`."""
    random.setstate(states['python'])
    name, keys, *rest = states['numpy']
    np.random.set_state((name, np.frombuffer(keys, np.uint32), *rest))
    torch.set_rng_state(_as_tensor(states['torch']))
    if 'cuda' in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_as_tensor(states['cuda']))


def _as_tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


class WorkerStates:
    """The random states of a loader's workers, for checkpoints.

    The workers' random numbers continue from epoch to epoch, and the workers
    run ahead of the training. After every batch each worker writes its states
    into memory that it shares with the main process, which keeps the states
    of as many batches as a worker can be ahead. A resumed loader starts its
    workers from :attr:`initial`.

    Args:
        loader: A loader with workers. Its ``collate_fn`` and
            ``worker_init_fn`` are wrapped.
        endless: True for training by iterations, which iterates over the
            loader once; False for training by epochs, which does so once per
            epoch.

    Attributes:
        initial: States to start the workers from, as :meth:`read` returns
            them.
        taken: The number of batches that the training has taken; of those of
            the epoch, where :meth:`begin` was called.
    """

    def __init__(self, loader: DataLoader, *, endless: bool) -> None:
        workers, ahead = loader.num_workers, loader.prefetch_factor or 2
        self.rows = torch.zeros(
            workers, ahead + 2, ROW_BYTES, dtype=torch.uint8
        ).share_memory_()
        self.done = torch.full((workers,), -1).share_memory_()
        self.notes = torch.zeros(NOTE_BYTES, dtype=torch.uint8)
        self.notes.share_memory_()
        self.endless = endless
        self.initial: list[dict[str, Any]] | None = None
        self.taken = 0
        self._first = 0
        self._before: list[int] | None = None
        self._collate = loader.collate_fn
        self._init = loader.worker_init_fn
        self._memory: PythonState | None = None
        loader.collate_fn = self.collate
        loader.worker_init_fn = self.init_worker

    def begin(self, loader: DataLoader, first: int) -> None:
        """Begin an epoch, whose first batches may have been trained on.

        Args:
            loader: The loader, before its pass over the data.
            first: The number of those batches.
        """
        running = loader.persistent_workers and loader._iterator is not None
        if not running:
            self.done.fill_(-1)
        self._before = self.done.clamp(min=0).tolist()
        self._first = self.taken = first

    def collate(self, batch: list[Any]) -> Any:
        """Collate a batch in the worker, then record the worker's states."""
        if not batch:
            return None  # it only passes a worker's turn
        result = self._collate(batch)
        info = get_worker_info()
        assert info is not None  # loaders without workers are not watched
        batches = int(self.done[info.id]) + 1
        self._record(info.id, batches)
        if self._memory is not None and not batches & (batches - 1):
            self._note(self._memory)
        return result

    def init_worker(self, worker_id: int) -> None:
        """Seed a worker as configured, or set it to the resumed states."""
        if self._init is not None:
            self._init(worker_id)
        if self.initial:
            restore(self.initial[worker_id])
        self._record(worker_id, 0)
        info = get_worker_info()
        if info is not None and worker_id == 0:
            self._memory = PythonState({}, {'data': info.dataset})

    def read(self) -> list[dict[str, Any]] | None:
        """Return the workers' states after the last batch that was taken.

        They are in the order in which the resumed workers take over, because
        an endless loader continues with the worker whose turn it is.

        Returns:
            The states of each worker; before the first batch
            :attr:`initial`.
        """
        if not self.taken and self._before is None:
            return self.initial
        while (self.done < 0).any():
            time.sleep(0.01)  # a worker is still starting
        workers = range(len(self.rows))
        if self._before is not None:
            count = len(workers)
            return [
                self._states(
                    i,
                    self._before[i]
                    + len(range(i, self.taken, count))
                    - len(range(i, self._first, count)),
                )
                for i in workers
            ]
        if not self.endless:  # the epoch is over and the workers are idle
            return [self._states(i, int(self.done[i])) for i in workers]
        turn = self.taken % len(workers)
        return [
            self._states(i, len(range(i, self.taken, len(workers))))
            for i in (*workers[turn:], *workers[:turn])
        ]

    def memories(self) -> list[str]:
        """Return the names of what the data pipeline of a worker remembers.

        The first worker looks after 1, 2, 4, 8, … batches. What it finds is
        in the memory of its process, and cannot be saved.
        """
        names = self.notes.numpy().tobytes().rstrip(b'\0').decode()
        return names.splitlines()

    def _note(self, memory: PythonState) -> None:
        changes = memory.changes()
        names = [f'{each[0]}.{each[2]}' for each in changes.saved]
        text = '\n'.join(names + changes.lost).encode('ascii', 'replace')
        text = text[:NOTE_BYTES]
        self.notes.numpy()[: len(text)] = np.frombuffer(text, np.uint8)

    def _record(self, worker: int, batches: int) -> None:
        states = pickle.dumps(capture())
        row = self.rows[worker, batches % self.rows.shape[1]].numpy()
        row[: len(states)] = np.frombuffer(states, dtype=np.uint8)
        self.done[worker] = batches

    def _states(self, worker: int, batches: int) -> dict[str, Any]:
        row = self.rows[worker, batches % self.rows.shape[1]]
        return pickle.loads(row.numpy().tobytes())
