"""Download files and unpack archives, so that a rerun continues.

Like :mod:`mmkd.data`, which has the errors, this needs the standard library
only.
"""

import hashlib
import http.client
import lzma
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from mmkd.errors import DataError

from . import StrPath, data_error, replacing

Progress = Callable[[int, int | None], None]
"""Called with the bytes done and their total (``None``: not known)."""

AGAIN = 'Run the same command again: it continues from there.'
DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,  # encrypted, or packed by a method that zipfile lacks
)


def verify(
    path: StrPath,
    *,
    md5: str | None = None,
    sha256: str | None = None,
    size: int | None = None,
    remedy: str,
) -> None:
    """Check a file's size in bytes and its checksums, as far as given.

    Raises:
        DataError: One of them differs, or there is no file. It is left as
            it is.
    """
    path = Path(path)
    if not path.is_file():
        got = 'a folder' if path.is_dir() else 'nothing'
        raise data_error(path, 'a file', got, remedy)
    found = path.stat().st_size
    if size is not None and found != size:
        raise data_error(path, f'{size} bytes', f'{found}', remedy)
    for name, wanted in (('md5', md5), ('sha256', sha256)):
        if wanted is None:
            continue
        digest = hashlib.new(name, usedforsecurity=False)
        with path.open('rb') as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != wanted:
            got = digest.hexdigest()
            raise data_error(path, f'{name} {wanted}', got, remedy)


def download(
    url: str,
    target: StrPath,
    *,
    md5: str | None = None,
    sha256: str | None = None,
    size: int | None = None,
    progress: Progress | None = None,
    timeout: float = 30,
    attempts: int = 5,
) -> bool:
    """Download a file, continuing one that broke off.

    What has arrived lies in ``TARGET.part`` and takes its name only once
    size and checksum are right. A broken connection is taken up again where
    it broke (HTTP Range) as long as more arrives, at most ``attempts``
    times; a server without Range starts over.

    Args:
        url: An ``http`` or ``https`` address.
        target: File to write. If it exists it is verified and kept.
        md5: Checksum in hexadecimal digits, if known.
        sha256: Likewise.
        size: In bytes, if known.
        progress: Called with bytes done and total.
        timeout: Seconds of silence after which the connection is broken.
        attempts: Connections in one call.

    Returns:
        Whether anything was downloaded.

    Raises:
        DataError: The server cannot be reached or refuses, the connection
            breaks (what has arrived is kept), the disk is full, or size or
            checksum differ (a complete wrong download is discarded; a wrong
            ``target`` is left).
    """
    target = Path(target)
    if not url.startswith(('http://', 'https://')):
        remedy = 'Give such an address.'
        raise data_error('download', 'http:// or https://', repr(url), remedy)
    expected = {'md5': md5, 'sha256': sha256, 'size': size}
    if target.exists():
        remedy = f'It was left as it is; move it away to download {url}.'
        verify(target, **expected, remedy=remedy)  # type: ignore[arg-type]
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + '.part')
    for _ in range(attempts):
        before = _size(part)
        if before == size or _fetch(url, part, size, progress, timeout):
            break
        if _size(part) <= before:
            raise _broken(url, part, size)
    else:
        raise _broken(url, part, size)
    try:
        remedy = f'This download of {url} was discarded; run it again.'
        verify(part, **expected, remedy=remedy)  # type: ignore[arg-type]
    except DataError:
        part.unlink()  # it is complete, so it could never become right
        raise
    os.replace(part, target)
    return True


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _broken(url: str, part: Path, size: int | None) -> DataError:
    expected = f'{size} bytes' if size else 'the whole file'
    got = f'a broken connection after {_size(part)} bytes'
    return data_error(url, expected, got, AGAIN)


def _fetch(
    url: str,
    part: Path,
    size: int | None,
    progress: Progress | None,
    timeout: float,
) -> bool:
    """Append to ``part`` over one connection; whether it is complete."""
    done = _size(part)
    headers = {'User-Agent': 'mmkd', 'Accept-Encoding': 'identity'}
    if done:
        headers['Range'] = f'bytes={done}-'
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:
            # nothing is left after `done`: complete, or of another file
            held = error.headers.get('Content-Range', '').rpartition('/')[2]
            if held == str(done):
                return True
            part.unlink()
            return _fetch(url, part, size, progress, timeout)
        got = f'HTTP {error.code} {error.reason}'
        remedy = 'Check the address, or give a local copy with --from.'
        raise data_error(url, 'a file', got, remedy) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, 'reason', None) or error
        remedy = (
            f'Check the network, or give a local copy with --from. {AGAIN}'
        )
        raise data_error(url, 'an answer', f'"{reason}"', remedy) from None
    with response:
        if response.status != 206 or not _starts_at(response, done):
            done = 0
        length = response.headers.get('Content-Length')
        total = size if length is None else done + int(length)
        _check_offer(url, part, done, total, size)
        try:
            with part.open('ab' if done else 'wb') as file:
                return _receive(response, file, done, total, progress)
        except OSError as error:
            reason = error.strerror or str(error)
            remedy = f'Free some space. {AGAIN}'
            raise data_error(
                part, 'room to write', f'"{reason}"', remedy
            ) from None


def _starts_at(response: http.client.HTTPResponse, start: int) -> bool:
    given = response.headers.get('Content-Range', '')
    return given.startswith(f'bytes {start}-')


def _check_offer(
    url: str, part: Path, done: int, total: int | None, size: int | None
) -> None:
    """Refuse what can only fail, before it takes an hour."""
    if total is None:
        return
    if size is not None and total != size:
        remedy = 'The file may have moved; give a local copy with --from.'
        raise data_error(url, f'{size} bytes', f'a file of {total}', remedy)
    free = shutil.disk_usage(part.parent).free
    if free < total - done:
        expected = f'{total - done} free bytes for {url}'
        remedy = f'Free some space. {AGAIN}'
        raise data_error(part.parent, expected, f'{free}', remedy)


def _receive(
    response: http.client.HTTPResponse,
    file: IO[bytes],
    done: int,
    total: int | None,
    progress: Progress | None,
) -> bool:
    """Write what arrives; whether that was everything."""
    while True:
        try:
            # read() would lose what came before a break in chunked data
            chunk = response.read1(1 << 18)
        except (OSError, http.client.HTTPException):
            return False
        if not chunk:
            return total is None or done == total
        file.write(chunk)
        done += len(chunk)
        if progress is not None:
            progress(done, total)


def extract(
    archive: StrPath,
    target: StrPath,
    *,
    select: Callable[[str], str | None] = str,
    progress: Progress | None = None,
) -> int:
    """Unpack the regular files of a zip or (compressed) tar archive.

    Each file takes its name once it is written in full, and a file that is
    there with the right size is not written again: an interrupted call is
    continued by the next. Links and devices are left out.

    Args:
        archive: The archive.
        target: Folder to unpack into.
        select: Maps the name of a file in the archive to its path in
            ``target``, or to ``None`` to leave it out.
        progress: Called with bytes done, and with no total.

    Returns:
        How many files were written.

    Raises:
        DataError: The file is no archive, damaged or cut off, or names a
            path outside of ``target``.
    """
    archive, target = Path(archive), Path(target)
    written = done = 0
    remedy = 'If it was downloaded, remove it and run again; else replace it.'
    try:
        with closing(_members(archive, remedy)) as members:
            for name, size, read in members:
                place = select(name)
                if place is None:
                    continue
                path = _inside(archive, target, place)
                if not path.is_file() or path.stat().st_size != size:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with read() as source, replacing(path) as file:
                        shutil.copyfileobj(source, file, 1 << 20)
                    written += 1
                done += size
                if progress is not None:
                    progress(done, None)
    except DAMAGED as error:
        raise data_error(archive, 'an archive', f'"{error}"', remedy) from None
    except OSError as error:
        if error.errno is not None:
            raise
        # a damaged gzip is told by an OSError without a number
        raise data_error(archive, 'an archive', f'"{error}"', remedy) from None
    return written


def _members(
    archive: Path, remedy: str
) -> Generator[tuple[str, int, Callable[[], IO[bytes]]], None, None]:
    """Name, size and reader of each regular file."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                if not info.is_dir():
                    reader = partial(packed.open, info)
                    yield info.filename, info.file_size, reader
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile():
                    reader = partial(_read_member, tar, member)
                    yield member.name, member.size, reader
    else:
        got = f'{archive.stat().st_size} bytes that are none, or cut off'
        raise data_error(archive, 'a zip or tar archive', got, remedy)


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(member)
    assert file is not None  # it is regular
    return file


def _inside(archive: Path, target: Path, name: str) -> Path:
    # Nothing of the tar or zip but bytes under this path is ever written, so
    # no other filter is needed.
    path = PurePosixPath(name)
    if path.is_absolute() or '..' in path.parts or '\\' in name:
        remedy = 'Do not use this archive.'
        raise data_error(
            archive, f'paths inside of {target}', repr(name), remedy
        )
    return target / path
