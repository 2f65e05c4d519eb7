"""Download files and unpack archives, so that a rerun continues.

Pooch downloads as well, but it starts an interrupted download over (COCO's
photos are 19 GB), replaces a file whose checksum differs, and takes a folder
for unpacked as soon as every name is there.
"""

import bz2
import errno
import gzip
import hashlib
import lzma
import os
import shutil
import stat
import struct
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, cast

import requests
from filelock import AcquireReturnProxy, FileLock, Timeout
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

from mmkd.errors import DataError

from .errors import data_error
from .files import StrPath, replacing

CHUNK = 1 << 14
"""Bytes that a broken connection loses at most."""
AGAIN = 'Run the same command again: it continues from there.'
ATTEMPTS = 5
TIMEOUT = 30
"""Seconds of silence after which a connection counts as broken."""
DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,  # encrypted, or packed by a method that zipfile lacks
    ValueError,  # a header with numbers that cannot be
    OverflowError,
    struct.error,
)
FREE_BYTES = 64 << 20
"""So many bytes an archive may always unpack to."""
RATIO = 50
"""An archive may unpack to so many times its size. Photos gain nothing from
compression, and annotations become 5 to 25 times as small."""
MOST_MEMBERS = 2**21
"""ImageNet, the largest set that is commonly packed in one file, has 1.4
million images."""
DEEPEST = 32
"""So many folders may lie in one another in an archive."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server, and what is known of it.

    ``known_hash`` is ``md5:`` or ``sha256:`` and the checksum in hexadecimal
    digits, or the first of them; ``size`` is in bytes.
    """

    url: str
    known_hash: str | None = None
    size: int | None = None

    @property
    def name(self) -> str:
        return self.url.rpartition('/')[2]


def verify(path: StrPath, remote: RemoteFile, *, remedy: str) -> None:
    """Check that a file is what a server has, as far as that is known.

    Raises:
        DataError: There is no file, or its size or checksum differs; it is
            left as it is. The last sentence is ``remedy``.
    """
    path = Path(path)
    if not path.is_file():
        got = 'a folder' if path.is_dir() else 'nothing'
        raise data_error(path, 'a file', got, remedy)
    size = path.stat().st_size
    if remote.size not in (None, size):
        raise data_error(path, f'{remote.size} bytes', f'{size}', remedy)
    if remote.known_hash is not None:
        name, _, wanted = remote.known_hash.partition(':')
        digest = hashlib.new(name, usedforsecurity=False)
        with path.open('rb') as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        found = digest.hexdigest()
        if not found.startswith(wanted):
            raise data_error(path, f'the {name} hash {wanted}', found, remedy)


def download(remote: RemoteFile, target: StrPath) -> bool:
    """Download a file over http(s), or continue an interrupted download.

    What has arrived lies in ``TARGET.part``, which becomes ``target`` only
    once its size and checksum are right. A broken connection is taken up
    again where it broke (HTTP Range) as long as more arrives; a server
    without Range starts over. Other processes that want the same file wait.
    A ``target`` that exists is verified and kept.

    Returns:
        Whether anything was downloaded.

    Raises:
        DataError: The server cannot be reached or refuses, the connection
            breaks (what has arrived is kept), the disk is full, or the size
            or checksum differs (a complete wrong download is discarded; a
            wrong ``target`` is left as it is).
    """
    target = Path(target)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(f'.{target.name}.lock')
        with _alone(lock, target):
            if not target.exists():
                _download(remote, target)
                lock.unlink(missing_ok=True)  # whoever waits looks for target
                return True
    remedy = f'It was left as it is; move it away to download {remote.url}.'
    verify(target, remote, remedy=remedy)
    return False


def _alone(path: Path, target: Path) -> AcquireReturnProxy:
    """Take a lock, and say so if it has to be waited for."""
    lock = FileLock(path)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        what = 'waiting for another process that downloads it'
        print(f'{target}: {what}', file=sys.stderr, flush=True)
        return lock.acquire()


def _download(remote: RemoteFile, target: Path) -> None:
    part = target.with_name(f'{target.name}.part')
    _receive_all(remote, part)
    try:
        what = f'This download of {remote.url} was discarded'
        verify(part, remote, remedy=f'{what}; run it again.')
    except DataError:
        part.unlink()  # it is complete, so it could never become right
        raise
    os.replace(part, target)


def _receive_all(remote: RemoteFile, part: Path) -> None:
    """Connect until a part is complete, as long as more arrives."""
    for _ in range(ATTEMPTS):
        before = _size(part)
        if before == remote.size:
            return
        try:
            return _receive(remote, part)
        except requests.RequestException as error:
            reason = _cause(error)
        except OSError as error:
            got = f'"{error.strerror or error}"'
            remedy = f'Free some space. {AGAIN}'
            raise data_error(part, 'room to write', got, remedy) from None
        if _size(part) <= before:
            break
    got = f'"{reason}" after {_size(part)} bytes'
    remedy = f'Check the network, or give a local copy instead. {AGAIN}'
    raise data_error(remote.url, 'the whole file', got, remedy)


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _cause(error: BaseException) -> str:
    """Say what happened below the layers of requests."""
    suppressed = error.__suppress_context__
    below = error.__cause__ if suppressed else error.__context__
    return str(error) if below is None else _cause(below)


def _receive(remote: RemoteFile, part: Path) -> None:
    """Append what a part lacks, over one connection."""
    headers = {'User-Agent': 'mmkd', 'Accept-Encoding': 'identity'}
    if done := _size(part):
        headers['Range'] = f'bytes={done}-'
    with requests.get(
        remote.url, headers=headers, stream=True, timeout=TIMEOUT
    ) as answer:
        if answer.status_code == 416 and done:
            part.write_bytes(b'')  # complete, or of a shorter file
            return _receive(remote, part)
        given = answer.headers.get('Content-Range', '')
        if answer.status_code != 206 or not given.startswith(f'bytes {done}-'):
            done = 0
        total = _accept(remote, answer, part, done)
        with part.open('ab' if done else 'wb') as file, progress() as bar:
            task = bar.add_task(part.stem, total=total, completed=done)
            for chunk in answer.iter_content(CHUNK):
                file.write(chunk)
                bar.advance(task, len(chunk))
            if total not in (None, file.tell()):  # urllib3 1 does not look
                raise requests.ConnectionError('the connection broke')


def _accept(
    remote: RemoteFile, answer: requests.Response, part: Path, done: int
) -> int | None:
    """Return the file's size; refuse what can only fail an hour later."""
    remedy = 'Check the address, or give a local copy instead.'
    if not answer.ok:
        got = f'HTTP {answer.status_code} {answer.reason}'
        raise data_error(remote.url, 'a file', got, remedy)
    length = answer.headers.get('Content-Length')
    if length is None:
        return remote.size
    total = done + int(length)
    if remote.size not in (None, total):
        expected = f'{remote.size} bytes'
        raise data_error(remote.url, expected, f'a file of {total}', remedy)
    free = shutil.disk_usage(part.parent).free
    if free < int(length):
        expected = f'{length} free bytes for {remote.url}'
        remedy = f'Free some space. {AGAIN}'
        raise data_error(part.parent, expected, f'{free}', remedy)
    return total


def progress() -> Progress:
    """Return a bar of bytes for the terminal; elsewhere it stays silent."""
    console = Console(stderr=True)
    return Progress(
        *Progress.get_default_columns(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def extract(
    archive: StrPath,
    target: StrPath,
    *,
    select: Callable[[str], str | None] = str,
    limit: int | None = None,
) -> int:
    """Unpack the regular files of a zip or (compressed) tar archive.

    Each file gets its name once it is written in full, and a file that is
    there with the right size is not written again, so the next call continues
    an interrupted one. Links and devices are left out.

    Args:
        archive: The archive.
        target: The folder to unpack into.
        select: Maps the name of a file in the archive to its path in
            ``target``, or to ``None`` to leave it out.
        limit: The most bytes that the archive may hold, unpacked, whether
            they are selected or not; by default 64 MiB or 50 times the
            archive's size, whichever is more.

    Returns:
        How many files were written.

    Raises:
        DataError: The file is no archive, damaged or cut off; it names a
            path outside of ``target``, or one path twice (in other letters
            as well); or it unpacks to more than ``limit``, than fits on the
            disk, or to more than two million files.
    """
    archive, target = Path(archive), Path(target)
    written = 0
    what = f'unpacking {archive.name}'
    try:
        with (
            progress() as bar,
            bar.open(archive, 'rb', description=what) as file,
        ):
            most = limit or max(FREE_BYTES, RATIO * archive.stat().st_size)
            places = _Places(archive, target)
            for name, size, content in _members(archive, file, most):
                place = select(name)
                if place is None:
                    continue
                path = places.take(place)
                if not path.is_file() or path.stat().st_size != size:
                    places.check_room(size)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with content() as source, replacing(path) as new:
                        shutil.copyfileobj(source, new, 1 << 20)
                    written += 1
    except (NotADirectoryError, FileExistsError, IsADirectoryError) as error:
        got = f'a file where a folder belongs, or the reverse: {error}'
        raise refused(archive, 'files and folders', got) from None
    except DataError:
        raise
    except (*DAMAGED, OSError) as error:
        # A damaged gzip is told by an OSError without a number, and a place
        # before the beginning of a zip is an invalid argument.
        number = getattr(error, 'errno', None)
        if number not in (None, errno.EINVAL):
            raise
        raise _damaged(archive, str(error).partition('\n')[0]) from None
    return written


def _damaged(archive: Path, what: str) -> DataError:
    remedy = 'If it was downloaded, remove it and run again; else replace it.'
    return data_error(archive, 'an archive', f'"{what}"', remedy)


def refused(archive: Path, expected: str, got: str) -> DataError:
    """Word the error for an archive that nobody has packed in good faith."""
    return data_error(archive, expected, got, 'Do not use this archive.')


def _members(
    archive: Path, file: IO[bytes], most: int
) -> Iterator[tuple[str, int, Callable[[], IO[bytes]]]]:
    """Yield the name, the size and a reader of each regular file."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as packed:
            infos = packed.infolist()
            if len(infos) > MOST_MEMBERS:
                raise _too_many(archive)
            total = sum(info.file_size for info in infos)
            if total > most:
                raise _too_large(archive, f'{total:,} bytes', most)
            for info in infos:
                kind = stat.S_IFMT(info.external_attr >> 16)
                if not info.is_dir() and kind in (0, stat.S_IFREG):
                    reader = partial(packed.open, info)
                    yield info.filename, info.file_size, reader
        return
    # tarfile would read what is compressed without an end
    stream = cast(IO[bytes], _Bounded(archive, _decompressed(file), most))
    total = 0
    with tarfile.open(fileobj=stream, mode='r:') as tar:
        for number, member in enumerate(tar):
            tar.members = []  # type: ignore[attr-defined]  # it keeps each
            if number == MOST_MEMBERS:
                raise _too_many(archive)
            if member.size < 0:
                raise _damaged(archive, f'{member.name!r} of a size below 0')
            total += member.size  # a sparse one holds more than its bytes
            if total > most:
                raise _too_large(archive, f'{total:,} bytes or more', most)
            if member.isfile():
                yield member.name, member.size, partial(_open, tar, member)
        # tarfile takes a damaged header for the end
        stream.seek(tar.offset)
        if stream.read(tarfile.BLOCKSIZE).strip(b'\0'):
            raise _damaged(archive, 'bad header')


def _too_large(archive: Path, got: str, most: int) -> DataError:
    return refused(archive, f'an archive of at most {most:,} bytes', got)


def _too_many(archive: Path) -> DataError:
    expected = f'an archive of at most {MOST_MEMBERS:,} files'
    return refused(archive, expected, 'more')


def _decompressed(file: IO[bytes]) -> Any:
    """Open what may be compressed; a tar has none of these beginnings."""
    file.seek(0)
    start = file.read(6)
    file.seek(0)
    if start.startswith(b'\x1f\x8b'):
        return gzip.GzipFile(fileobj=file)
    if start.startswith(b'BZh'):
        return bz2.BZ2File(file)
    if start == b'\xfd7zXZ\0':
        return lzma.LZMAFile(file)
    return file


class _Bounded:
    """Read a tar, but no further than its files can reach.

    ``tarfile`` trusts the sizes in headers: it reads a long name into memory,
    decompresses whatever it skips, and goes round in a circle where a size is
    negative.
    """

    HEADER = 1 << 20
    """The most that is read at once: ``extract`` copies such pieces."""

    def __init__(self, archive: Path, file: Any, most: int) -> None:
        self.archive, self.file, self.most = archive, file, most
        # each file has a header, and a tar ends in up to 10 KiB of zeros
        self.end = 2 * most + (1 << 20)
        self.done = 0

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.HEADER:
            got = f'a header that asks for {size:,} bytes'
            raise refused(self.archive, 'names of files', got)
        found = self.file.read(size)
        self.done += len(found) or size
        if self.done > self.end:
            raise _too_large(self.archive, 'more', self.most)
        return found

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        if position > self.end:
            raise _too_large(self.archive, 'more', self.most)
        return self.file.seek(position, whence)

    def tell(self) -> int:
        return self.file.tell()


def _open(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(member)
    assert file is not None  # it is regular
    return file


class _Places:
    """Where the files of an archive go: inside of a folder, each once."""

    def __init__(self, archive: Path, target: Path) -> None:
        self.archive, self.target = archive, target
        self.taken: set[str] = set()

    def take(self, name: str) -> Path:
        # Nothing but the bytes of regular files is ever written, below this
        # path, so tarfile's filters are not needed.
        path, windows = PurePosixPath(name), PureWindowsPath(name)
        odd = any(ord(character) < 32 for character in name)
        if (
            path.is_absolute()
            or windows.drive
            or not path.parts
            or '..' in path.parts
            or '\\' in name
            or odd
        ):
            expected = f'paths inside of {self.target}'
            raise refused(self.archive, expected, repr(name))
        if len(path.parts) > DEEPEST or len(os.fsencode(path.name)) > 200:
            expected = f'at most {DEEPEST} folders and names of 200 bytes'
            got = f'{name[:60]!r}… ({len(name):,} letters)'
            raise refused(self.archive, expected, got)
        # as a file system compares that does not tell A from a
        key = unicodedata.normalize('NFC', str(path)).casefold()
        if key in self.taken:
            raise refused(self.archive, 'each path once', f'{name!r} twice')
        self.taken.add(key)
        return self.target / path

    def check_room(self, size: int) -> None:
        there = self.target
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        if size > free:
            expected = f'{size:,} free bytes to unpack {self.archive.name}'
            remedy = f'Free some space. {AGAIN}'
            raise data_error(self.target, expected, f'{free:,}', remedy)
