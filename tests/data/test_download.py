import gzip
import hashlib
import io
import multiprocessing
import os
import random
import re
import shutil
import signal
import stat
import tarfile
import threading
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from filelock import FileLock, Timeout

from mmkd.data import download as module
from mmkd.data.download import RemoteFile, download, extract, verify
from mmkd.errors import DataError

CONTENT = random.Random(0).randbytes(100_000)
MD5 = f'md5:{hashlib.md5(CONTENT).hexdigest()}'
SHA256 = f'sha256:{hashlib.sha256(CONTENT).hexdigest()}'
WRONG = f'md5:{"0" * 32}'


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, 'CHUNK', 1000)


@pytest.fixture
def remote(site):
    (site.folder / 'x.bin').write_bytes(CONTENT)
    return RemoteFile(f'{site.url}/x.bin', MD5)


@pytest.fixture
def ranges(site):
    """What was asked for: from where on."""
    return lambda: [asked for _, asked in site.asked]


@pytest.fixture
def target(tmp_path):
    return tmp_path / 'downloads' / 'x.bin'


@pytest.fixture
def part(target):
    target.parent.mkdir()
    return target.with_name('x.bin.part')


def files(target):
    """List the files that users see in the folder of a download."""
    return sorted(path.name for path in target.parent.glob('[!.]*'))


# ----------------------------------------------------------------- download


def test_once(remote, ranges, target):
    assert download(RemoteFile(remote.url, SHA256, len(CONTENT)), target)
    assert target.read_bytes() == CONTENT
    assert os.listdir(target.parent) == ['x.bin']
    assert not download(remote, target)
    assert ranges() == [None]


def test_a_terminal_shows_progress(remote, target, monkeypatch, capsys):
    monkeypatch.setenv('FORCE_COLOR', '1')  # rich takes it for a terminal
    download(remote, target)
    archive = make_archive(target.with_name('y.zip'))
    extract(archive, target.with_name('out'))
    text = capsys.readouterr().err
    assert re.search(r'x\.bin .*100%.*100\.0/100\.0 kB', text)
    assert re.search(r'unpacking y\.zip .*100%', text)


@pytest.mark.parametrize(
    ('there', 'size', 'asked'),
    [
        (CONTENT[:30_000], None, ['bytes=30000-']),
        (CONTENT, len(CONTENT), []),
        # nothing is left after the part: whose it is can't be told
        (CONTENT, None, ['bytes=100000-', None]),
        (CONTENT + b'more', None, ['bytes=100004-', None]),
    ],
)
def test_it_continues_a_part(remote, ranges, target, part, there, size, asked):
    part.write_bytes(there)
    assert download(RemoteFile(remote.url, MD5, size), target)
    assert ranges() == asked
    assert target.read_bytes() == CONTENT
    assert files(target) == ['x.bin']


@pytest.mark.parametrize('chunked', [False, True])
def test_it_continues_when_the_connection_breaks(
    site, remote, ranges, target, chunked
):
    site.chunked = chunked
    site.cuts = [20_000, 30_000]
    assert download(remote, target)
    assert ranges() == [None, 'bytes=20000-', 'bytes=50000-']
    assert target.read_bytes() == CONTENT


def test_it_gives_up_and_a_rerun_continues(site, remote, ranges, target):
    site.cuts = [1_000] * 5
    with pytest.raises(
        DataError, match=r'expected the whole file.*after 5000 bytes.*contin'
    ):
        download(remote, target)
    assert files(target) == ['x.bin.part']
    assert download(remote, target)
    assert ranges()[-1] == 'bytes=5000-'
    assert target.read_bytes() == CONTENT


def test_it_gives_up_when_nothing_arrives(site, remote, ranges, target):
    site.cuts = [0] * 5
    with pytest.raises(DataError, match='after 0 bytes'):
        download(remote, target)
    assert len(ranges()) == 1


def test_it_starts_over_without_range(site, remote, ranges, target, part):
    site.ranges = False
    site.cuts = [20_000]
    part.write_bytes(CONTENT[:10_000])
    assert download(remote, target)
    assert ranges() == ['bytes=10000-', 'bytes=20000-']
    assert target.read_bytes() == CONTENT


def test_a_killed_process_leaves_a_part(site, remote, ranges, target):
    process = multiprocessing.get_context('fork').Process(
        target=download, args=(remote, target)
    )
    site.cuts = [50_000]

    def kill():
        while not (files(target) and os.path.getsize(f'{target}.part')):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)

    site.at_cut = kill
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert files(target) == ['x.bin.part']
    size = os.path.getsize(f'{target}.part')
    assert download(remote, target)
    assert ranges() == [None, f'bytes={size}-']
    assert target.read_bytes() == CONTENT


def test_three_at_the_same_time(
    site, remote, ranges, target, capsys, monkeypatch
):
    waiting = threading.Semaphore(0)

    class Watched(FileLock):
        def acquire(self, *args, **kwargs):
            try:
                return super().acquire(*args, **kwargs)
            except Timeout:
                waiting.release()
                raise

    monkeypatch.setattr(module, 'FileLock', Watched)
    site.cuts = [50_000]
    site.at_cut = lambda: [waiting.acquire() for _ in range(2)]
    with ThreadPoolExecutor(3) as pool:
        new = pool.map(lambda _: download(remote, target), range(3))
    assert sorted(new) == [False, False, True]
    assert ranges() == [None, 'bytes=50000-']
    assert target.read_bytes() == CONTENT
    assert capsys.readouterr().err.count('waiting for another process') == 2


def test_it_discards_what_has_the_wrong_checksum(remote, target, part):
    part.write_bytes(b'of another file')
    neighbour = target.with_name('y.bin')
    neighbour.write_bytes(b'good')
    with pytest.raises(
        DataError,
        match=r'expected the md5 hash .*, got .* was discarded; run it',
    ):
        download(remote, target)
    assert files(target) == ['y.bin']
    assert neighbour.read_bytes() == b'good'
    assert download(remote, target)


@pytest.mark.parametrize('known', [(WRONG,), (None, 5)])
def test_it_leaves_a_wrong_file(remote, ranges, target, part, known):
    target.write_bytes(CONTENT)
    with pytest.raises(DataError, match='It was left as it is; move it'):
        download(RemoteFile(remote.url, *known), target)
    assert target.read_bytes() == CONTENT
    assert ranges() == []


def test_it_refuses_an_offer_of_another_size(remote, target, part):
    part.write_bytes(CONTENT[:10])
    with pytest.raises(DataError, match='expected 5 bytes, got a file of 1'):
        download(RemoteFile(remote.url, MD5, 5), target)
    assert part.read_bytes() == CONTENT[:10]


def test_it_looks_for_room_first(site, remote, target):
    site.claims = 10**18
    with pytest.raises(
        DataError, match=rf'expected {10**18} free bytes .* Free some space'
    ):
        download(remote, target)
    assert files(target) == []


@contextmanager
def largest_file(size):
    resource = pytest.importorskip('resource')
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_disk_that_becomes_full(remote, target):
    with (
        largest_file(40_000),
        pytest.raises(DataError, match='expected room to write, got'),
    ):
        download(remote, target)
    assert files(target) == ['x.bin.part']
    assert download(remote, target)
    assert target.read_bytes() == CONTENT


def test_no_file_no_server_and_no_address(site, target):
    remote = RemoteFile(f'{site.url}/x.bin')
    with pytest.raises(DataError, match='got HTTP 404 Not Found'):
        download(remote, target)
    site.close()
    with pytest.raises(DataError, match=r'"[^"]*refused".*the network'):
        download(remote, target)
    with pytest.raises(DataError, match=r'adapters .*file:///etc/passwd'):
        download(RemoteFile('file:///etc/passwd'), target)
    assert files(target) == []


@pytest.mark.parametrize(
    ('known', 'message'),
    [
        ((SHA256[:20],), None),
        ((MD5, len(CONTENT)), None),
        ((WRONG,), f'md5 hash 0{{32}}, got {MD5[4:]}. Help'),
        ((None, 3), '3 bytes, got 100000. Help'),
    ],
)
def test_verify(tmp_path, known, message):
    path = tmp_path / 'x'
    path.write_bytes(CONTENT)
    remote = RemoteFile('', *known)
    if message is None:
        verify(path, remote, remedy='Help')
    else:
        with pytest.raises(DataError, match=message):
            verify(path, remote, remedy='Help')
    with pytest.raises(DataError, match='a file, got a folder'):
        verify(tmp_path, remote, remedy='')


# ------------------------------------------------------------------ archives

MEMBERS = {'top/a.txt': b'a' * 5_000, 'top/sub/b.txt': CONTENT, 'c.txt': b'c'}
KINDS = ('x.zip', 'x.tar', 'x.tar.gz')


@pytest.fixture(params=KINDS)
def archive(tmp_path, request):
    return make_archive(tmp_path / request.param)


def make_archive(path, members=MEMBERS):
    if path.suffix == '.zip':
        with zipfile.ZipFile(path, 'w') as packed:
            packed.mkdir('top')
            for name, content in members.items():
                packed.writestr(name, content)
        return path
    with tarfile.open(path, 'w:gz' if path.suffix == '.gz' else 'w') as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo('top/link')
        link.type, link.linkname = tarfile.SYMTYPE, '/etc'
        tar.addfile(link)
    return path


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file()
    }


def test_extract(archive, tmp_path):
    out = tmp_path / 'out'
    assert extract(archive, out) == 3
    assert contents(out) == MEMBERS
    assert not (out / 'top' / 'link').is_symlink()
    assert extract(archive, out) == 0
    (out / 'c.txt').write_bytes(b'')
    assert extract(archive, out) == 1
    assert contents(out) == MEMBERS


def test_extract_selects_and_renames(archive, tmp_path):
    out = tmp_path / 'out'

    def select(name):
        return name.removeprefix('top/') if name.startswith('top/') else None

    assert extract(archive, out, select=select) == 2
    assert set(contents(out)) == {'a.txt', 'sub/b.txt'}


def test_extract_continues_after_an_interrupt(archive, tmp_path):
    out = tmp_path / 'out'

    def interrupt(name):
        if name == 'c.txt':
            raise KeyboardInterrupt
        return name

    with pytest.raises(KeyboardInterrupt):
        extract(archive, out, select=interrupt)
    assert set(contents(out)) == {'top/a.txt', 'top/sub/b.txt'}
    assert extract(archive, out) == 1
    assert contents(out) == MEMBERS


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    'name', ['../evil', '/tmp/evil', 'a/../../evil', '..\\evil']
)
def test_extract_stays_inside(tmp_path, kind, name):
    archive = make_archive(tmp_path / kind, {'a/ok': b'1', name: b'2'})
    out = tmp_path / 'deep' / 'out'
    with pytest.raises(DataError, match=r'paths inside of .*evil'):
        extract(archive, out)
    assert contents(tmp_path / 'deep') == {'out/a/ok': b'1'}


# What an archive of an attacker holds. Each is refused, and nothing is written
# outside of the folder or beyond the limit.

SMALL = ('x.zip', 'x.tar.gz', 'x.tar.bz2', 'x.tar.xz')


def make_bomb(path, size=400 << 20):
    """A file of zeros, which packs to a thousandth."""
    piece = bytes(1 << 20)
    if path.suffix == '.zip':
        with (
            zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as packed,
            packed.open('zeros', 'w', force_zip64=True) as file,
        ):
            for _ in range(size >> 20):
                file.write(piece)
        return path
    info = tarfile.TarInfo('zeros')
    info.size = size

    class Zeros(io.RawIOBase):
        def read(self, count=-1):
            return bytes(count)

    with tarfile.open(path, f'w:{path.suffix[1:]}') as tar:
        tar.addfile(info, Zeros())
    return path


@pytest.mark.parametrize('kind', SMALL)
def test_a_small_archive_of_much(tmp_path, kind):
    archive = make_bomb(tmp_path / kind, 80 << 20)
    assert archive.stat().st_size < 1 << 20
    out = tmp_path / 'out'
    expected = 'of at most 67,108,864 bytes, got 83,886,080 bytes'
    for select in (str, lambda name: None):  # skipping costs as much
        with pytest.raises(DataError, match=expected):
            extract(archive, out, select=select)
    assert not contents(out)
    assert extract(archive, out, limit=1 << 30) == 1
    with pytest.raises(DataError, match='at most 1,000 bytes'):
        extract(archive, tmp_path / 'new', limit=1000)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['x.zip', 'x.tar.gz', 'x.tar.xz'])
def test_an_archive_of_400_mib_in_less_than_one(tmp_path, kind):
    archive = make_bomb(tmp_path / kind)
    assert archive.stat().st_size < 1 << 20
    with pytest.raises(DataError, match='at most 67,108,864 bytes'):
        extract(archive, tmp_path / 'out')
    assert not contents(tmp_path / 'out')


def test_real_annotations_are_no_bomb(tmp_path, shared_data):
    """The XML of a whole data set, which packs better than anything else."""
    archive = tmp_path / 'x.tar.xz'
    with tarfile.open(archive, 'w:xz') as tar:
        tar.add(shared_data / 'bccd' / 'BCCD' / 'Annotations', 'a')
    unpacked = sum(map(len, contents(archive.parent).values()))
    assert extract(archive, tmp_path / 'out') == 364
    unpacked = sum(map(len, contents(tmp_path / 'out').values()))
    assert unpacked < module.RATIO / 1.5 * archive.stat().st_size


def header(name, size, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf())
    if size < 0:  # base 256, as for what octal digits cannot hold
        block[124:136] = size.to_bytes(12, 'big', signed=True)
    else:
        block[124:136] = b'\x80' + size.to_bytes(11, 'big')
    total = sum(block[:148]) + sum(block[156:]) + 8 * 32
    block[148:156] = b'%06o\0 ' % total
    return bytes(block)


@pytest.mark.parametrize(
    'headers',
    {
        'a file of 8 EiB': header('a', 2**63),
        'a long name of 4 GiB': header('a', 2**32, tarfile.GNUTYPE_LONGNAME),
        'a pax header of 4 GiB': header('a', 2**32, tarfile.XHDTYPE),
        'a negative size': header('a', -512),
        'a circle': header('a', 512) + bytes(512) + header('b', -1536),
        'a header in the middle': header('a', 0) + b'x' * 512,
        'a negative pax header': header('a', -1024, tarfile.XHDTYPE),
    }.items(),
    ids=lambda pair: pair[0],
)
@pytest.mark.parametrize('packed', [False, True])
def test_headers_that_lie(tmp_path, headers, packed):
    archive = tmp_path / 'x.tar'
    content = headers[1] + bytes(20 << 10)
    archive.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError):
        extract(archive, tmp_path / 'out')
    assert sum(map(len, contents(tmp_path / 'out').values())) <= 512


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    'names',
    [
        ('a', 'a'),
        ('a', './a'),
        ('a/b', 'A/b'),
        ('\u00e9', 'e\u0301'),
        ('a', 'a/b'),
        ('a/b', 'a'),
        ('C:evil',),
        ('a\nb',),
        ('x' * 201,),
        ('/'.join(['x'] * 33),),
    ],
)
def test_names_that_no_data_set_has(tmp_path, kind, names):
    members = dict.fromkeys(names, b'1')
    archive = tmp_path / kind
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # zipfile's, of a name given twice
        if kind == 'x.zip':
            with zipfile.ZipFile(archive, 'w') as packed:
                for name in names:
                    packed.writestr(name, b'1')
        elif len(members) == len(names):
            make_archive(archive, members)
        else:
            with tarfile.open(archive, 'w') as tar:
                for name in names:
                    tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(DataError, match='Do not use this archive'):
        extract(archive, tmp_path / 'deep' / 'out')
    found = {
        path.relative_to(tmp_path).parts[0] for path in tmp_path.iterdir()
    }
    assert found <= {kind, 'deep'}
    assert contents(tmp_path).keys() <= {
        kind,
        'deep/out/a',
        'deep/out/a/b',
        'deep/out/\u00e9',
    }


def test_links_and_devices_in_a_zip_are_left_out(tmp_path):
    archive = tmp_path / 'x.zip'
    with zipfile.ZipFile(archive, 'w') as packed:
        for number, kind in enumerate((stat.S_IFLNK, stat.S_IFBLK)):
            info = zipfile.ZipInfo(f'odd{number}')
            info.external_attr = (kind | 0o777) << 16
            packed.writestr(info, '/etc/passwd')
        packed.writestr('a', '1')
    assert extract(archive, tmp_path / 'out') == 1
    assert contents(tmp_path / 'out') == {'a': b'1'}


def test_more_files_than_a_data_set_has(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'MOST_MEMBERS', 2)
    for kind in KINDS:
        archive = make_archive(tmp_path / kind)
        with pytest.raises(DataError, match='of at most 2 files, got more'):
            extract(archive, tmp_path / 'out')


def test_a_disk_without_room(tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=4_999)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: full)
    archive = make_archive(tmp_path / 'x.tar')
    with pytest.raises(DataError, match='5,000 free bytes to unpack'):
        extract(archive, tmp_path / 'out')
    assert not contents(tmp_path / 'out')


@pytest.mark.parametrize('share', [0.03, 0.5, 0.97])
def test_extract_of_a_truncated_archive(archive, tmp_path, share):
    whole = archive.read_bytes()
    # a tar ends in blocks of zeros that say nothing
    tar = archive.suffix == '.tar'
    length = whole.rfind(CONTENT[-9:]) if tar else len(whole)
    archive.write_bytes(whole[: int(length * share)])
    out = tmp_path / 'out'
    with pytest.raises(DataError, match='remove it and run again; else'):
        extract(archive, out)
    for name, content in contents(out).items():
        assert content == MEMBERS[name]


def test_extract_of_a_damaged_zip(tmp_path):
    archive = make_archive(tmp_path / 'x.zip')
    content = bytearray(archive.read_bytes())
    content[content.find(CONTENT[500:520])] ^= 1
    archive.write_bytes(content)
    with pytest.raises(DataError, match=r'Bad CRC-32.*top/sub/b\.txt'):
        extract(archive, tmp_path / 'out')
    assert set(contents(tmp_path / 'out')) == {'top/a.txt'}


@pytest.mark.parametrize('text', ['', '<html>not found</html>'])
def test_extract_of_something_else(tmp_path, text):
    path = tmp_path / 'x.zip'
    path.write_text(text)
    with pytest.raises(DataError, match='expected an archive, got "') as info:
        extract(path, tmp_path / 'out')
    assert '\n' not in str(info.value)
