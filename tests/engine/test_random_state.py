"""Random states, of the process and of a loader's workers."""

import itertools
import random

import numpy as np
import pytest
import torch
from mmengine.dataset import InfiniteSampler
from torch.utils.data import DataLoader, Dataset

from mmkd.engine.random_state import WorkerStates, capture, restore
from mmkd.utils import isolated_random_state
from tests.helpers import toy


def draw():
    """A number from each global generator."""
    return [random.random(), np.random.rand(), torch.rand(1).item()]


class TestStates:
    @pytest.mark.parametrize('drawn', [0, 1, 700])
    def test_restored(self, drawn):
        for _ in range(drawn):
            draw(), np.random.randn()  # an odd number: one is kept back
        states = capture()
        expected = [draw(), np.random.randn(), random.gauss(0, 1)]
        assert [draw(), np.random.randn(), random.gauss(0, 1)] != expected
        restore(states)
        assert [draw(), np.random.randn(), random.gauss(0, 1)] == expected

    def test_capturing_draws_nothing(self):
        before = capture()
        assert toy.same(before, capture())

    def test_saved_and_read_without_running_code(self, tmp_path):
        states = capture()
        torch.save(states, tmp_path / 'states.pth')
        loaded = torch.load(tmp_path / 'states.pth', weights_only=True)
        assert toy.same(loaded, states)
        expected = draw()
        restore(loaded)
        assert draw() == expected


class TestIsolation:
    def test_nothing_is_drawn_outside(self):
        states = capture()
        with isolated_random_state():
            draw()
        with pytest.raises(ZeroDivisionError), isolated_random_state(5):
            draw()[0] / 0
        assert toy.same(capture(), states)

    def test_a_seed(self):
        with isolated_random_state(5):
            first = draw()
        draw()
        with isolated_random_state(5):
            assert draw() == first


class Numbers(Dataset):
    """Each item is its index and what a transform draws."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return [index, *draw()]


def loader(*, endless, workers, **options):
    data = Numbers()
    sampler = InfiniteSampler(data, seed=0) if endless else None
    return DataLoader(
        data,
        batch_size=2,
        num_workers=workers,
        persistent_workers=not endless,
        sampler=sampler,
        collate_fn=list,
        worker_init_fn=lambda number: torch.manual_seed(number),
        **options,
    )


@pytest.fixture(autouse=True)
def seeded():
    with isolated_random_state(0):
        yield


class TestWorkers:
    @pytest.mark.parametrize('workers', [1, 3])
    def test_epochs(self, workers):
        whole = loader(endless=False, workers=workers)
        states = WorkerStates(whole, endless=False)
        assert states.read() is None
        for _ in range(2):
            for _ in whole:
                states.taken += 1
        saved = states.read()
        expected = list(whole)

        resumed = loader(endless=False, workers=workers)
        WorkerStates(resumed, endless=False).initial = saved
        assert list(resumed) == expected
        assert list(loader(endless=False, workers=workers)) != expected

    @pytest.mark.parametrize(
        ('workers', 'ahead'), [(1, None), (2, None), (3, 4)]
    )
    @pytest.mark.parametrize('taken', [1, 4, 11])
    def test_iterations(self, workers, ahead, taken):
        """Workers are ahead; the resumed ones take turns from the next on."""
        whole = loader(
            endless=True, workers=workers, prefetch_factor=ahead or 2
        )
        states = WorkerStates(whole, endless=True)
        batches = iter(whole)
        for _ in range(taken):
            next(batches)
            states.taken += 1
        saved = states.read()
        expected = list(itertools.islice(batches, 9))

        resumed = loader(endless=True, workers=workers)
        resumed.sampler.skip(2 * taken)
        again = WorkerStates(resumed, endless=True)
        again.initial = saved
        assert again.read() == saved  # before the first batch
        batches = iter(resumed)
        assert list(itertools.islice(batches, 9)) == expected

    def test_the_configured_seeds_without_states(self):
        plain = list(loader(endless=False, workers=2))
        watched = loader(endless=False, workers=2)
        WorkerStates(watched, endless=False)
        with isolated_random_state(0):
            torch.empty((), dtype=torch.int64).random_()
        for batch, other in zip(plain, watched, strict=True):
            assert [item[0] for item in batch] == [item[0] for item in other]
            assert [item[3] for item in batch] == [item[3] for item in other]

    @pytest.mark.slow
    def test_spawned_workers(self):
        states, expected = None, None
        for resumed in (False, True):
            each = DataLoader(
                Numbers(),
                batch_size=2,
                num_workers=2,
                persistent_workers=True,
                multiprocessing_context='spawn',
            )
            watch = WorkerStates(each, endless=False)
            if resumed:
                watch.initial = states
                assert toy.same(list(each), expected)
            else:
                for _ in each:
                    watch.taken += 1
                states, expected = watch.read(), list(each)
