"""What the data sets of `tools/prepare_data.py` share.

The standard library is enough for it; that tool makes `mmkd.data` importable.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmkd.data import Conversion, data_error, write_json
from mmkd.data.download import download, extract


@dataclass(frozen=True)
class Archive:
    """A file to download; ``size`` in bytes."""

    url: str
    md5: str | None = None
    size: int | None = None

    @property
    def name(self) -> str:
        return self.url.rpartition('/')[2]


class Bar:
    """A line of progress: redrawn on a terminal, now and then elsewhere."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.live = sys.stderr.isatty()
        self.last = time.monotonic()
        self.end = ''

    def __call__(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if now - self.last < (0.1 if self.live else 15) and done != total:
            return
        self.last = now
        text = f'{self.label}: {done / 1e6:.1f}'
        if total:
            text += f' of {total / 1e6:.1f} MB ({done / total:.0%})'
        else:
            text += ' MB'
        start, end = ('\r', '') if self.live else ('', '\n')
        print(start + text, end=end, file=sys.stderr, flush=True)
        self.end = '\n' if self.live else ''

    def __enter__(self) -> 'Bar':
        return self

    def __exit__(self, *_: object) -> None:
        print(end=self.end, file=sys.stderr, flush=True)


def say(text: str) -> None:
    print(text, flush=True)


def fetch(archive: Archive, root: Path) -> Path:
    """Download into ``root/downloads``, or find it there."""
    path = root / 'downloads' / archive.name
    with Bar(archive.name) as bar:
        new = download(
            archive.url,
            path,
            md5=archive.md5,
            size=archive.size,
            progress=bar,
        )
    say(f'{path}: {"downloaded" if new else "already there"}')
    return path


def unpack(
    archive: Path, target: Path, select: Callable[[str], str | None]
) -> None:
    with Bar(f'unpacking {archive.name}') as bar:
        count = extract(archive, target, select=select, progress=bar)
    say(f'{archive.name}: {count} files unpacked into {target}')


def below(*starts: str) -> Callable[[str], str | None]:
    """Select the files of an archive whose path starts so."""
    return lambda name: name if name.startswith(starts) else None


def place(source: Path, target: Path, args: argparse.Namespace) -> None:
    """Link or copy a file or folder; what is there is never overwritten."""
    source = source.resolve()
    if os.path.lexists(target):
        if target.resolve() == source:
            say(f'{target}: already there')
            return
        if args.copy and file_sizes(source) == file_sizes(target):
            say(f'{target}: already there, with the same files')
            return
        kind = 'a link elsewhere' if target.is_symlink() else 'other data'
        remedy = 'Move it away and run again.'
        expected = f'nothing, or a link to {source}'
        raise data_error(target, expected, kind, remedy)
    inside = target.relative_to(args.root).parents
    refuse_links(*(args.root / path for path in inside if path.name))
    target.parent.mkdir(parents=True, exist_ok=True)
    if args.copy:
        copy(source, target)
        say(f'{target}: copied from {source}')
        return
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError as error:  # Windows, or a file system without links
        got = f'"{error.strerror}"'
        remedy = 'Use --copy.'
        raise data_error(target, 'to link', got, remedy) from None
    say(f'{target}: linked to {source}')


def file_sizes(path: Path) -> dict[str, int]:
    files = [path] if path.is_file() else path.rglob('*')
    return {
        file.relative_to(path).as_posix(): file.stat().st_size
        for file in files
        if file.is_file()
    }


def copy(source: Path, target: Path) -> None:
    # under another name until it is complete; a rerun continues
    partial = target.with_name(f'{target.name}.partial')
    if source.is_dir():
        shutil.copytree(
            source, partial, dirs_exist_ok=True, copy_function=copy_file
        )
    else:
        shutil.copyfile(source, partial)
    os.replace(partial, target)


def copy_file(source: str, target: str) -> None:
    size = os.path.getsize(source)
    if not os.path.isfile(target) or os.path.getsize(target) != size:
        shutil.copyfile(source, target)


def existing(path: Path, what: str) -> Path:
    if not path.exists():
        raise data_error(path, what, 'nothing', 'Check --from.')
    return path


def refuse_links(*paths: Path) -> None:
    """Nothing may be written into data that is only linked to."""
    for path in paths:
        if path.is_symlink():
            got = f'a link to {path.resolve()}, which is incomplete'
            remedy = 'Remove the link, or complete what it links to.'
            raise data_error(path, 'a folder to write into', got, remedy)


def write_converted(path: Path, converted: Conversion) -> None:
    """Write annotations, and tell what is in them and what is not."""
    new = write_json(path, converted.coco)
    counts = {key: len(rows) for key, rows in converted.coco.items()}
    say(
        f'{path}: {"written" if new else "already there"}, '
        f'{counts["images"]} images, {counts["annotations"]} boxes'
    )
    for what, notes in (
        ('without area, dropped', converted.dropped),
        ('outside of the image, clipped', converted.clipped),
    ):
        if notes:
            count = f'{len(notes)} box{"es" if len(notes) > 1 else ""}'
            more = f'; and {len(notes) - 10} more' if len(notes) > 10 else ''
            say(f'  {count} {what}: {"; ".join(notes[:10])}{more}')
