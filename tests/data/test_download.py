import hashlib
import http.server
import io
import os
import tarfile
import threading
import zipfile
from contextlib import contextmanager

import pytest

from mmkd.data.download import download, extract, verify
from mmkd.errors import DataError

CONTENT = bytes(os.urandom(100_000))
MD5 = hashlib.md5(CONTENT).hexdigest()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``CONTENT``, as well or badly as its server is told to."""

    protocol_version = 'HTTP/1.1'

    def do_GET(self):
        server, start = self.server, 0
        asked = self.headers.get('Range')
        server.asked.append(asked)
        if server.status != 200:
            return self.send_error(server.status)
        if asked and server.ranges:
            start = int(asked.removeprefix('bytes=').removesuffix('-'))
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(CONTENT)}')
            self.send_header('Content-Length', '0')
            return self.end_headers()
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        if start:
            last = len(CONTENT) - 1
            given = f'bytes {start}-{last}/{len(CONTENT)}'
            self.send_header('Content-Range', given)
        self.close_connection = True
        if server.chunked:
            self.send_header('Transfer-Encoding', 'chunked')
            self.end_headers()
            return self.send_chunks(body)
        length = server.claims or len(body)
        self.send_header('Content-Length', str(length))
        self.end_headers()
        return self.wfile.write(body[: server.cut()])

    def send_chunks(self, body):
        cut = self.server.cut()
        for place in range(0, len(body), 10_000):
            if cut is not None and place >= cut:
                return
            piece = body[place : place + 10_000]
            self.wfile.write(b'%x\r\n%s\r\n' % (len(piece), piece))
        self.wfile.write(b'0\r\n\r\n')

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    ranges = True
    chunked = False
    status = 200
    claims: int | None = None

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.asked: list[str | None] = []
        self.cuts: list[int] = []
        self.url = f'http://127.0.0.1:{self.server_port}/x.bin'

    def cut(self):
        """After how many bytes this connection breaks; None: it doesn't."""
        return self.cuts.pop(0) if self.cuts else None


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(
            target=server.serve_forever, kwargs={'poll_interval': 0.01}
        )
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path):
    return tmp_path / 'downloads' / 'x.bin'


@pytest.fixture
def part(target):
    target.parent.mkdir()
    return target.with_name('x.bin.part')


def files(target):
    return sorted(os.listdir(target.parent))


# ----------------------------------------------------------------- download


def test_download_once(server, target):
    seen = []
    assert download(
        server.url,
        target,
        md5=MD5,
        sha256=SHA256,
        size=len(CONTENT),
        progress=lambda *step: seen.append(step),
    )
    assert target.read_bytes() == CONTENT
    assert files(target) == ['x.bin']
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert not download(server.url, target, md5=MD5)
    assert server.asked == [None]


def test_download_continues_a_part(server, target, part):
    part.write_bytes(CONTENT[:30_000])
    assert download(server.url, target, md5=MD5)
    assert server.asked == ['bytes=30000-']
    assert target.read_bytes() == CONTENT
    assert files(target) == ['x.bin']


def test_download_takes_a_complete_part(server, target, part):
    part.write_bytes(CONTENT)
    assert download(server.url, target, md5=MD5, size=len(CONTENT))
    assert server.asked == []
    assert target.read_bytes() == CONTENT


def test_download_asks_about_a_complete_part_of_unknown_size(
    server, target, part
):
    part.write_bytes(CONTENT)
    assert download(server.url, target, md5=MD5)
    assert server.asked == ['bytes=100000-']
    assert target.read_bytes() == CONTENT


def test_download_drops_a_part_that_is_too_long(server, target, part):
    part.write_bytes(CONTENT + b'more')
    assert download(server.url, target, md5=MD5)
    assert server.asked == ['bytes=100004-', None]
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize('chunked', [False, True])
def test_download_continues_when_the_connection_breaks(
    server, target, chunked
):
    server.chunked = chunked
    server.cuts = [20_000, 30_000]
    assert download(server.url, target, md5=MD5)
    assert len(server.asked) == 3
    assert target.read_bytes() == CONTENT
    if not chunked:
        assert server.asked == [None, 'bytes=20000-', 'bytes=50000-']


def test_download_gives_up_and_a_rerun_continues(server, target):
    server.cuts = [1_000] * 5
    with pytest.raises(
        DataError, match=r'a broken connection after 5000 bytes.*continues'
    ):
        download(server.url, target, md5=MD5)
    assert files(target) == ['x.bin.part']
    assert target.with_name('x.bin.part').read_bytes() == CONTENT[:5_000]
    assert download(server.url, target, md5=MD5)
    assert server.asked[-1] == 'bytes=5000-'
    assert target.read_bytes() == CONTENT


def test_download_gives_up_when_nothing_arrives(server, target):
    server.cuts = [0] * 5
    with pytest.raises(DataError, match='broken connection after 0 bytes'):
        download(server.url, target)
    assert len(server.asked) == 1


def test_download_starts_over_without_range(server, target, part):
    server.ranges = False
    part.write_bytes(CONTENT[:30_000])
    assert download(server.url, target, md5=MD5)
    assert server.asked == ['bytes=30000-']
    assert target.read_bytes() == CONTENT


def test_download_starts_over_without_range_when_it_breaks(server, target):
    server.ranges = False
    server.cuts = [20_000]
    assert download(server.url, target, md5=MD5)
    assert server.asked == [None, 'bytes=20000-']
    assert target.read_bytes() == CONTENT


def test_download_discards_what_has_the_wrong_checksum(server, target, part):
    part.write_bytes(b'of another file')
    neighbour = target.with_name('y.bin')
    neighbour.write_bytes(b'good')
    with pytest.raises(
        DataError, match=f'expected md5 {MD5}, got .* was discarded; run it'
    ):
        download(server.url, target, md5=MD5)
    assert files(target) == ['y.bin']
    assert neighbour.read_bytes() == b'good'
    assert download(server.url, target, md5=MD5)


@pytest.mark.parametrize(
    'expected', [{'md5': MD5}, {'sha256': SHA256}, {'size': len(CONTENT)}]
)
def test_download_leaves_a_wrong_file(server, target, expected):
    target.parent.mkdir()
    target.write_bytes(b'mine')
    with pytest.raises(DataError, match='It was left as it is; move it'):
        download(server.url, target, **expected)
    assert target.read_bytes() == b'mine'
    assert server.asked == []


def test_download_refuses_an_offer_of_another_size(server, target, part):
    part.write_bytes(CONTENT[:10])
    with pytest.raises(DataError, match='expected 5 bytes, got a file of 1'):
        download(server.url, target, size=5)
    assert part.read_bytes() == CONTENT[:10]


def test_download_looks_for_room_first(server, target):
    server.claims = 10**18
    with pytest.raises(
        DataError, match=rf'expected {10**18} free bytes .* Free some space'
    ):
        download(server.url, target)
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


def test_download_to_a_disk_that_becomes_full(server, target):
    with (
        largest_file(40_000),
        pytest.raises(DataError, match='expected room to write, got'),
    ):
        download(server.url, target)
    assert files(target) == ['x.bin.part']
    assert download(server.url, target, md5=MD5)
    assert target.read_bytes() == CONTENT


def test_download_without_a_file_a_server_or_an_address(server, target):
    server.status = 404
    with pytest.raises(DataError, match='got HTTP 404 Not Found'):
        download(server.url, target)
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match=r'"[^"]*refused[^"]*".*the network'):
        download(server.url, target)
    with pytest.raises(DataError, match=r"http://.*got 'file:///etc/passwd'"):
        download('file:///etc/passwd', target)
    assert files(target) == []


def test_verify(tmp_path):
    path = tmp_path / 'x'
    path.write_bytes(CONTENT)
    verify(path, md5=MD5, sha256=SHA256, size=len(CONTENT), remedy='')
    for expected, message in (
        ({'md5': SHA256}, f'md5 {SHA256}, got {MD5}'),
        ({'sha256': MD5}, f'sha256 {MD5}, got {SHA256}'),
        ({'size': 3}, '3 bytes, got 100000. Help'),
    ):
        with pytest.raises(DataError, match=message):
            verify(path, **expected, remedy='Help')
    with pytest.raises(DataError, match='a file, got a folder'):
        verify(tmp_path, md5=MD5, remedy='')


# ------------------------------------------------------------------ archives

MEMBERS = {'top/a.txt': b'a' * 5_000, 'top/sub/b.txt': CONTENT, 'c.txt': b'c'}


def make_archive(path, members=MEMBERS):
    if path.suffix == '.zip':
        with zipfile.ZipFile(path, 'w') as packed:
            packed.mkdir('top')
            for name, content in members.items():
                packed.writestr(name, content)
        return path
    mode = 'w:gz' if path.suffix == '.gz' else 'w'
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo('top/link')
        link.type, link.linkname = tarfile.SYMTYPE, '/etc'
        tar.addfile(link)
    return path


KINDS = ('x.zip', 'x.tar', 'x.tar.gz')


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file()
    }


@pytest.mark.parametrize('kind', KINDS)
def test_extract(tmp_path, kind):
    archive = make_archive(tmp_path / kind)
    out = tmp_path / 'out'
    steps = []
    assert extract(archive, out, progress=lambda *s: steps.append(s)) == 3
    assert contents(out) == MEMBERS
    assert steps[-1] == (105_001, None)
    assert not (out / 'top' / 'link').is_symlink()
    assert extract(archive, out) == 0
    (out / 'c.txt').write_bytes(b'')
    assert extract(archive, out) == 1
    assert contents(out) == MEMBERS


@pytest.mark.parametrize('kind', KINDS)
def test_extract_selects_and_renames(tmp_path, kind):
    archive = make_archive(tmp_path / kind)
    out = tmp_path / 'out'

    def select(name):
        return name.removeprefix('top/') if name.startswith('top/') else None

    assert extract(archive, out, select=select) == 2
    assert set(contents(out)) == {'a.txt', 'sub/b.txt'}


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


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('share', [0.03, 0.5, 0.97])
def test_extract_of_a_truncated_archive(tmp_path, kind, share):
    archive = make_archive(tmp_path / kind)
    whole = archive.read_bytes()
    # a tar ends in blocks of zeros that say nothing
    length = whole.rfind(CONTENT[-9:]) if kind == 'x.tar' else len(whole)
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


def test_extract_of_something_else(tmp_path):
    path = tmp_path / 'x.zip'
    path.write_text('<html>not found</html>')
    with pytest.raises(DataError, match='got 22 bytes that are none'):
        extract(path, tmp_path / 'out')


@pytest.mark.parametrize('kind', KINDS)
def test_extract_continues_after_an_interrupt(tmp_path, kind):
    archive = make_archive(tmp_path / kind)
    out = tmp_path / 'out'

    def interrupt(done, _):
        if done > 5_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(archive, out, progress=interrupt)
    assert set(contents(out)) == {'top/a.txt', 'top/sub/b.txt'}
    assert extract(archive, out) == 1
    assert contents(out) == MEMBERS
