"""Entries on disk: whole or absent, bounded, shared by processes."""

import argparse
import fcntl
import multiprocessing
import os
import random
import resource
import signal
import time

import pytest
import torch

from mmkd.teachers.disk_cache import DiskCache
from tests.helpers import toy

processes = multiprocessing.get_context('fork')


def value(number, size=2000):
    return torch.full((size,), float(number))


def files(folder):
    return [path for path in folder.glob('??/*') if path.suffix != '.tmp']


def size_of(folder):
    return sum(path.stat().st_size for path in folder.glob('??/*'))


def test_what_comes_back(tmp_path):
    nested = (
        [torch.randn(2, 3), torch.arange(4)],
        {'a': torch.randn(2).half(), 'b': (None, torch.tensor(True))},
    )
    DiskCache(tmp_path, 10**6).write('key', nested)
    assert toy.same(DiskCache(tmp_path, 10**6).read('key'), nested)
    assert DiskCache(tmp_path, 10**6).read('other') is None


def broken(kind, path, other):
    content = path.read_bytes()
    if kind == 'another entry':
        return other.read_bytes()
    if kind.startswith('cut'):
        return content[: int(len(content) * float(kind[4:]))]
    place = int(float(kind[7:]) * (len(content) - 1))
    flipped = bytes([content[place] ^ 4])
    return content[:place] + flipped + content[place + 1 :]


@pytest.mark.parametrize(
    'kind',
    [
        *('another entry', 'cut 0', 'cut 0.001', 'cut 0.5', 'cut 0.9999'),
        *('change 0', 'change 0.003', 'change 0.3', 'change 0.7', 'change 1'),
    ],
)
def test_a_damaged_entry_is_absent_until_it_is_written_again(kind, tmp_path):
    cache = DiskCache(tmp_path, 10**6)
    cache.write('a', value(1))
    (path,) = files(tmp_path)
    cache.write('b', value(2))
    (other,) = {*files(tmp_path)} - {path}
    path.write_bytes(broken(kind, path, other))
    assert cache.read('a') is None
    cache.write('a', value(1))
    assert torch.equal(cache.read('a'), value(1))
    assert torch.equal(cache.read('b'), value(2))


@pytest.mark.parametrize('payload', [b'no archive', None])
def test_what_cannot_be_loaded_is_absent(payload, tmp_path, monkeypatch):
    """Whole entries: of something other than tensors, or of nothing."""
    cache = DiskCache(tmp_path, 10**6)
    if payload is not None:
        monkeypatch.setattr(
            torch, 'save', lambda value, file: file.write(payload)
        )
    cache.write('a', argparse.Namespace(b=1))  # read by pickle alone
    assert len(files(tmp_path)) == 1
    assert cache.read('a') is None
    monkeypatch.undo()
    cache.write('a', value(1))
    assert torch.equal(cache.read('a'), value(1))


class TestSize:
    def test_it_keeps_to_the_limit_and_what_is_used(self, tmp_path):
        cache = DiskCache(tmp_path, 100_000)
        for number in range(40):
            cache.write(str(number), value(number))
            assert size_of(tmp_path) <= 100_000
            assert torch.equal(cache.read('0'), value(0))
        held = [i for i in range(40) if cache.read(str(i)) is not None]
        # About 9.4 kB each; the newest, and the one that was always read.
        assert held == [0, *range(40 - len(held) + 1, 40)]
        assert 8 <= len(held) <= 10

    def test_a_lower_limit_holds_at_once(self, tmp_path):
        cache = DiskCache(tmp_path, 10**6)
        for number in range(20):
            cache.write(str(number), value(number))
        DiskCache(tmp_path, 50_000)
        assert 0 < size_of(tmp_path) <= 50_000

    def test_a_lost_sum_is_taken_again(self, tmp_path):
        cache = DiskCache(tmp_path, 50_000)
        for number in range(20):
            (tmp_path / 'total_bytes').write_text('' if number % 3 else '7x')
            cache.write(str(number), value(number))
            assert size_of(tmp_path) <= 50_000

    def test_an_entry_that_is_too_large_is_left_out(self, tmp_path):
        cache = DiskCache(tmp_path, 50_000)
        cache.write('small', value(1))
        cache.write('large', value(2, size=20_000))
        assert cache.read('large') is None
        assert cache.read('small') is not None


def test_a_full_disk_leaves_the_entry_out(tmp_path):
    cache = DiskCache(tmp_path, 10**6)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        cache.write('a', value(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cache.read('a') is None
    assert list(tmp_path.glob('??/*')) == []
    cache.write('a', value(1))
    assert torch.equal(cache.read('a'), value(1))


# ------------------------------------------------------------------ processes


def write_for_ever(folder):
    cache = DiskCache(folder, 10**6)
    for number in range(10**9):
        cache.write(str(number % 50), value(number % 50, 5000))


def test_a_killed_writer_leaves_nothing_wrong(tmp_path):
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        writer = processes.Process(target=write_for_ever, args=(folder,))
        writer.start()
        while not files(folder):
            assert writer.is_alive()
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.1))  # it may be anywhere
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        cache = DiskCache(folder, 10**6)
        assert list(folder.glob('??/*.tmp')) == []
        found = [cache.read(str(number)) for number in range(50)]
        assert any(entry is not None for entry in found)
        for number, entry in enumerate(found):
            assert entry is None or torch.equal(entry, value(number, 5000))


def use(folder, seed, limit):
    generator = random.Random(seed)
    cache = DiskCache(folder, limit)
    for _ in range(150):
        number = generator.randrange(30)
        entry = cache.read(str(number))
        assert entry is None or torch.equal(entry, value(number))
        if entry is None:
            cache.write(str(number), value(number))
            with open(folder / 'lock') as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # nobody else writes
                assert size_of(folder) <= limit


def test_processes_that_share_it(tmp_path):
    limit = 100_000  # a third of what they write
    users = [
        processes.Process(target=use, args=(tmp_path, seed, limit))
        for seed in range(4)
    ]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert [user.exitcode for user in users] == [0] * 4
    assert limit / 2 < size_of(tmp_path) <= limit
    cache = DiskCache(tmp_path, limit)
    known = sum(cache.read(str(number)) is not None for number in range(30))
    assert known >= 5
