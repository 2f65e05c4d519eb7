"""Entries on disk: whole or absent, bounded, shared by processes."""

import argparse
import fcntl
import multiprocessing
import os
import random
import resource
import signal
import time
import zipfile

import pytest
import torch

from mmkd.teachers import disk_cache
from mmkd.teachers.disk_cache import DiskCache
from tests.helpers import hostile, toy
from tests.helpers.hold import cpu_seconds

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


# ---------------------------------------------------------------------- kills

KILLS = 200
INSIDE = 'ab/notes.txt'
FOREIGN = ('notes.txt', INSIDE, '../beside.txt')
"""Files in and beside the folder that are none of the cache's."""


def content(key):
    """What belongs under a key: its values, and its size, are its own."""
    return value(key, 500 + 97 * key)


def write_some(folder, limit, seed):
    """Write entries that the other writer writes too, and some of its own."""
    generator = random.Random(seed)
    cache = DiskCache(folder, limit)
    while True:
        key = generator.randrange(40) + generator.choice([0, 100 * seed % 300])
        cache.write(str(key), content(key))


@pytest.mark.slow
def test_two_writers_that_are_killed(tmp_path, request):
    """200 times one of them, at a random instant of its writing.

    Everything that can be read is right, at any time; the folder keeps to its
    limit, and the other writer goes on.
    """
    draw = random.Random(request.config.getoption('seed'))
    folder, limit = tmp_path / 'cache', 400_000
    cache = DiskCache(folder, limit)
    for name in FOREIGN:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)

    def start(seed):
        job = (folder, limit, seed)
        writer = processes.Process(target=write_some, args=job)
        writer.start()
        return writer

    writers = [start(seed) for seed in (1, 2)]
    read = 0
    try:
        for kill in range(KILLS):
            victim = draw.randrange(2)
            instant = draw.uniform(0, 0.05)  # its start takes 2 ms
            while cpu_seconds(writers[victim].pid) < instant:
                assert writers[victim].is_alive()
                time.sleep(0.0005)
            os.kill(writers[victim].pid, signal.SIGKILL)
            writers[victim].join()
            writers[victim] = start(kill + 3)
            for key in draw.sample(range(340), 40):
                entry = cache.read(str(key))
                assert entry is None or torch.equal(entry, content(key))
                read += entry is not None
            with cache._turn():  # nobody writes
                assert size_of(folder) - len(INSIDE) <= limit
    finally:
        for writer in writers:
            writer.kill()
            writer.join()
    assert read > KILLS
    for name in FOREIGN:
        assert (folder / name).read_text() == name
    # It is usable: it takes all that fits, and gives it back.
    cache = DiskCache(folder, limit)
    assert not list(folder.glob('??/*.tmp'))
    for key in range(5):
        cache.write(str(key), content(key))
    for key in range(5):
        assert torch.equal(cache.read(str(key)), content(key))


# ------------------------------------------------------- links, foreign files


def victim(tmp_path):
    """A file outside of the cache that nothing may change."""
    path = tmp_path / 'thesis.tex'
    path.write_text('years of work')
    return path


@pytest.mark.parametrize('name', ['lock', 'total_bytes'])
@pytest.mark.parametrize('make', [os.symlink, os.link])
def test_no_file_of_its_own_is_a_way_out(tmp_path, name, make):
    (tmp_path / 'cache').mkdir()
    path = victim(tmp_path)
    make(path, tmp_path / 'cache' / name)
    if (name, make) == ('lock', os.symlink):
        with pytest.raises(OSError, match=r'symbolic links'):
            DiskCache(tmp_path / 'cache', 10**6)
    else:
        DiskCache(tmp_path / 'cache', 10**6).write('a', value(1))
    assert path.read_text() == 'years of work'


def test_a_lock_that_becomes_a_link(tmp_path):
    """A run goes on without the cache."""
    cache = DiskCache(tmp_path / 'cache', 10**6)
    path = victim(tmp_path)
    (tmp_path / 'cache' / 'lock').unlink()
    (tmp_path / 'cache' / 'lock').symlink_to(path)
    cache.write('a', value(1))
    assert cache.read('a') is None
    assert path.read_text() == 'years of work'


def test_folders_and_entries_that_are_links(tmp_path):
    """Nothing is read, written or removed through them."""
    source = DiskCache(tmp_path / 'source', 10**6)
    source.write('a', value(1))
    (entry,) = files(tmp_path / 'source')
    cache = DiskCache(tmp_path / 'cache', 10**6)
    bucket = tmp_path / 'cache' / entry.parent.name
    bucket.symlink_to(entry.parent)
    assert cache.read('a') is None
    cache.write('a', value(2))
    DiskCache(tmp_path / 'cache', 1)  # as good as full
    assert torch.equal(source.read('a'), value(1))
    bucket.unlink()
    bucket.mkdir()
    (bucket / entry.name).symlink_to(entry)
    assert cache.read('a') is None
    DiskCache(tmp_path / 'cache', 1)
    assert (bucket / entry.name).is_symlink()
    cache.write('a', value(2))  # takes the place of the link
    assert torch.equal(cache.read('a'), value(2))
    assert torch.equal(source.read('a'), value(1))


def test_foreign_files_are_kept(tmp_path):
    cache = DiskCache(tmp_path, 50_000)
    foreign = [
        *('ab/notes.txt', 'ab/x.tmp', 'photos/1.jpg', 'my/0', '00.tar'),
        *(f'ab/{"0" * 30}', f'ab/{"1" * 32}.tmp', f'ab/{"2" * 31}'),
    ]
    for name in foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('x' * 40_000)
    for number in range(30):
        cache.write(str(number), value(number))
    DiskCache(tmp_path, 1)
    kept = {path for path in tmp_path.rglob('*') if path.is_file()}
    own = {tmp_path / 'lock', tmp_path / 'total_bytes'}
    assert kept == own | {tmp_path / name for name in foreign}


def test_entries_of_another_version_are_removed(tmp_path):
    cache = DiskCache(tmp_path, 10**6)
    cache.write('a', value(1))
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'\x02\r\n', b'\x01\r\n', 1))
    assert cache.read('a') is None
    DiskCache(tmp_path, 1)
    assert not path.exists()


def forged(folder, cache, payload):
    """An entry with a right checksum that somebody has made."""
    cache.write('a', value(1))
    (path,) = files(folder)
    path.write_bytes(
        disk_cache.MAGIC + disk_cache._checksum('a', payload) + payload
    )
    return path


def test_a_forged_entry_runs_no_code(tmp_path):
    cache = DiskCache(tmp_path / 'cache', 10**6)
    evil = hostile.checkpoint(
        tmp_path / 'evil.pth', x=hostile.RunsCode(tmp_path / 'trace')
    )
    forged(tmp_path / 'cache', cache, evil.read_bytes())
    assert cache.read('a') is None
    assert not (tmp_path / 'trace').exists()
    cache.write('a', value(1))
    assert torch.equal(cache.read('a'), value(1))


def test_forged_entries_take_no_memory(tmp_path):
    cache = DiskCache(tmp_path / 'cache', 10**6)
    bomb = tmp_path / 'bomb.pth'
    with zipfile.ZipFile(bomb, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('bomb/data/0', bytes(300 << 20))
    path = forged(tmp_path / 'cache', cache, bomb.read_bytes())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert cache.read('a') is None
    os.truncate(path, 2**40)  # it claims a terabyte
    assert cache.read('a') is None
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - peak < 100 << 10


@pytest.mark.parametrize('total', [b'-9999999', b'9' * 5000, b'\xff', b''])
def test_a_forged_sum(tmp_path, total):
    cache = DiskCache(tmp_path, 50_000)
    for number in range(20):
        (tmp_path / 'total_bytes').write_bytes(total)
        cache.write(str(number), value(number))
        assert size_of(tmp_path) <= 50_000
    assert cache.read('19') is not None
