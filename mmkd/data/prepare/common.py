"""What the data sets of `mmkd prepare` share."""

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmkd.errors import DataError

from ..coco import CocoAnnotations
from ..download import RemoteFile, download, extract
from ..errors import data_error
from ..files import real_path, write_json


def say(text: str) -> None:
    print(text, flush=True)


def is_there(what: object, check: Callable[..., object], *args: Any) -> bool:
    """Say so if data are complete; ``check(*args)`` raises if they are not."""
    try:
        check(*args)
    except DataError:
        return False
    say(f'{what}: already there')
    return True


def fetch(archive: RemoteFile, root: Path) -> Path:
    """Download an archive into ``root/downloads``, or find it there."""
    path = root / 'downloads' / archive.name
    if not path.exists():
        say(f'{path}: downloading {archive.url}')
    new = download(archive, path)
    say(f'{path}: {"downloaded" if new else "already there"}')
    return path


def unpack(
    archive: Path, target: Path, select: Callable[[str], str | None]
) -> None:
    count = extract(archive, target, select=select)
    say(f'{archive.name}: {count} files unpacked into {target}')


def below(start: str) -> Callable[[str], str | None]:
    """Select the files of an archive whose path starts with ``start``."""
    return lambda name: name if name.startswith(start) else None


def place(source: Path, target: Path, args: argparse.Namespace) -> None:
    """Link or copy a file or folder; what is there is never overwritten."""
    source = real_path(source)
    if os.path.lexists(target):
        if real_path(target) == source:
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
    # It has another name until it is complete, and a rerun continues.
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
    """Refuse to write into data that is only linked to."""
    for path in paths:
        if path.is_symlink():
            got = f'a link to {real_path(path)}, which is incomplete'
            remedy = 'Remove the link, or complete what it links to.'
            raise data_error(path, 'a folder to write into', got, remedy)


def write_converted(path: Path, converted: CocoAnnotations) -> None:
    """Write annotations, and tell what they hold and what was changed."""
    new = write_json(path, converted.content)
    counts = {key: len(rows) for key, rows in converted.content.items()}
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
