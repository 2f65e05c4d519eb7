"""Download files and unpack archives, so that a rerun continues.

Pooch downloads as well, but it starts an interrupted download over (COCO's
photos are 19 GB), replaces a file whose checksum differs, and takes a folder
for unpacked as soon as every name is there.
"""

import hashlib
import lzma
import os
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

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
)


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

    Returns:
        How many files were written.

    Raises:
        DataError: The file is no archive, damaged or cut off, or names a
            path outside of ``target``.
    """
    archive, target = Path(archive), Path(target)
    written = 0
    what = f'unpacking {archive.name}'
    try:
        with (
            progress() as bar,
            bar.open(archive, 'rb', description=what) as file,
        ):
            for name, size, content in _members(file):
                place = select(name)
                if place is None:
                    continue
                path = _inside(archive, target, place)
                if not path.is_file() or path.stat().st_size != size:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with content() as source, replacing(path) as new:
                        shutil.copyfileobj(source, new, 1 << 20)
                    written += 1
    except (*DAMAGED, OSError) as error:
        # a damaged gzip is told by an OSError without a number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        got = f'"{str(error).partition(chr(10))[0]}"'
        remedy = 'If it was downloaded, remove it and run again; else replace'
        raise data_error(archive, 'an archive', got, f'{remedy} it.') from None
    return written


def _members(
    file: IO[bytes],
) -> Iterator[tuple[str, int, Callable[[], IO[bytes]]]]:
    """Yield the name, the size and a reader of each regular file."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as packed:
            for info in packed.infolist():
                if not info.is_dir():
                    reader = partial(packed.open, info)
                    yield info.filename, info.file_size, reader
        return
    file.seek(0)
    with tarfile.open(fileobj=file) as tar:
        for member in tar:
            if member.isfile():
                yield member.name, member.size, partial(_open, tar, member)


def _open(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(member)
    assert file is not None  # it is regular
    return file


def _inside(archive: Path, target: Path, name: str) -> Path:
    # Nothing but the bytes of regular files is ever written, below this
    # path, so tarfile's filters are not needed.
    path = PurePosixPath(name)
    if path.is_absolute() or '..' in path.parts or '\\' in name:
        expected = f'paths inside of {target}'
        remedy = 'Do not use this archive.'
        raise data_error(archive, expected, repr(name), remedy)
    return target / path
