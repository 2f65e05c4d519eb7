"""Random states of the training process and of its data-loading workers.

MMEngine resumes weights and optimisers, not random numbers: the samplers of
two-stage detectors and the augmentations then draw other ones than the
uninterrupted run. With these states a resumed run is that run.
"""

import pickle
import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

ROW_BYTES = 16384
"""Room for one worker's pickled states (about 10,700 bytes)."""


def capture() -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's global generators."""
    states = {
        'python': random.getstate(),
        'numpy': np.random.get_state(),
        'torch': torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states['cuda'] = torch.cuda.get_rng_state()
    return states


def restore(states: dict[str, Any]) -> None:
    """Put states from :func:`capture` back."""
    random.setstate(states['python'])
    np.random.set_state(states['numpy'])
    torch.set_rng_state(states['torch'].cpu())
    if 'cuda' in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states['cuda'].cpu())


def packed(states: Any) -> torch.Tensor:
    """States as a tensor of bytes, which any checkpoint may hold."""
    return torch.frombuffer(
        bytearray(pickle.dumps(states)), dtype=torch.uint8
    )


def unpacked(states: torch.Tensor) -> Any:
    """Undo :func:`packed`."""
    return pickle.loads(states.cpu().numpy().tobytes())


class WorkerStates:
    """Records the random states of a loader's persistent workers.

    Persistent workers draw on from epoch to epoch. Each writes its states
    behind every batch into memory it shares with the main process, where they
    are read at the end of an epoch, when the workers rest. A loader resumed
    with :attr:`initial` starts its workers from there.

    Args:
        loader: A loader with ``persistent_workers``. Its ``collate_fn`` and
            ``worker_init_fn`` are wrapped.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.rows = torch.zeros(
            loader.num_workers, ROW_BYTES, dtype=torch.uint8
        ).share_memory_()
        self.initial: list[bytes | None] | None = None
        self._collate = loader.collate_fn
        self._init = loader.worker_init_fn
        loader.collate_fn = self.collate
        loader.worker_init_fn = self.init_worker

    def collate(self, batch: list[Any]) -> Any:
        """Collate in the worker, then record its states."""
        result = self._collate(batch)
        states = pickle.dumps(capture())
        row = self.rows[get_worker_info().id].numpy()
        row[:4] = np.frombuffer(
            len(states).to_bytes(4, 'little'), dtype=np.uint8
        )
        row[4 : 4 + len(states)] = np.frombuffer(states, dtype=np.uint8)
        return result

    def init_worker(self, worker_id: int) -> None:
        """Seed a worker as configured, or from the resumed states."""
        if self._init is not None:
            self._init(worker_id)
        states = self.initial[worker_id] if self.initial else None
        if states:
            restore(pickle.loads(states))

    def read(self) -> list[bytes | None]:
        """Each worker's states as bytes; None for one that never worked."""
        result: list[bytes | None] = []
        for row in self.rows.numpy():
            length = int.from_bytes(row[:4].tobytes(), 'little')
            result.append(row[4 : 4 + length].tobytes() if length else None)
        return result
