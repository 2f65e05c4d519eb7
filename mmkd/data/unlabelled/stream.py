"""The endless stream of batches of images without labels."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.dataset import pseudo_collate
from mmengine.logging import print_log
from torch.utils.data import DataLoader, Sampler

from .views import UnlabelledImages

NAMED = 10
"""So many images that cannot be read are named."""


class UnlabelledStream:
    """Batches of images without labels, for one of several processes.

    The stream goes on for ever. A batch holds the images of its positions,
    which the processes share; it does not depend on the number of workers. A
    stream that begins at :attr:`taken` is therefore the rest of another one,
    bit for bit. It draws no global random numbers.

    Args:
        dataset: The images, with their views.
        batch_size: The images of a batch of one process.
        num_workers: The processes that read images; 0 for none.
        rank: The number of this process.
        world_size: The number of processes.

    Attributes:
        taken: How many images all processes have taken together.
    """

    def __init__(
        self,
        dataset: UnlabelledImages,
        batch_size: int,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        self.num_workers = num_workers
        self.rank, self.world_size = rank, world_size
        self.taken = 0
        self._skipped: set[str] = set()
        self._batches: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        """Return the next batch of this process, collated."""
        if self._batches is None:
            self._batches = iter(self._loader())
        batch = next(self._batches)
        self.taken += self.batch_size * self.world_size
        for names in batch.pop('skipped'):
            for name in names:
                self._tell(name)
        return batch

    def close(self) -> None:
        """End the workers; the stream can go on afterwards."""
        self._batches = None

    def _loader(self) -> DataLoader:
        first = self.taken + self.rank * self.batch_size
        positions = _Positions(
            first, self.batch_size, self.batch_size * self.world_size
        )
        return DataLoader(
            self.dataset,
            batch_sampler=positions,
            num_workers=self.num_workers,
            collate_fn=_collate,
            # A loader draws from its generator when it starts.
            generator=torch.Generator(),
        )

    def _tell(self, name: str) -> None:
        """Name an image that cannot be read, once."""
        if name in self._skipped:
            return
        self._skipped.add(name)
        count = len(self._skipped)
        if count <= NAMED:
            more = ' Further ones are only counted.' * (count == NAMED)
            print_log(
                f'distillation.unlabelled: {name} cannot be read; another '
                f'image takes its place ({count} so far).{more}',
                'current',
                logging.WARNING,
            )
        elif not count % 100:
            print_log(
                f'distillation.unlabelled: {count} images cannot be read.',
                'current',
                logging.WARNING,
            )


class _Positions(Sampler[list[int]]):
    """The positions of the batches of one process, without an end."""

    def __init__(self, first: int, size: int, step: int) -> None:
        self.first, self.size, self.step = first, size, step

    def __iter__(self) -> Iterator[list[int]]:
        first = self.first
        while True:
            yield list(range(first, first + self.size))
            first += self.step


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    skipped = [item.pop('skipped') for item in items]
    return {**pseudo_collate(items), 'skipped': skipped}
