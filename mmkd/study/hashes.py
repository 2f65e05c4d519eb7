"""Hashes of what a training depends on: code, checkpoints, data."""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from mmengine.config import Config
from torch.hub import get_dir

import mmkd

TOOLS = [
    Path(mmkd.__file__).parent / 'cli' / name
    for name in ('train.py', 'test.py')
]
"""The programs that train and test."""
TEXTS = {'.json', '.xml', '.txt', '.csv'}


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def hash_code(root: Path = Path(mmkd.__file__).parent) -> str:
    """Of all of mmkd's Python files, by name and content."""
    files = {
        str(path.relative_to(root)): hash_file(path)
        for path in sorted(root.rglob('*.py'))
    }
    return hash_text(json.dumps(files))


def hash_tools() -> str:
    """Of the programs that train and test."""
    return hash_text(' '.join(map(hash_file, TOOLS)))


def is_file(path: str) -> bool:
    return '://' not in path and Path(path).is_file()


def local_file(source: str) -> Path | None:
    """The file of a checkpoint's path or URL; None if there is none (yet).

    A URL's is the one that :func:`.load_checkpoint_file` has
    downloaded.
    """
    url = urlparse(source)
    path = Path(source).expanduser()
    if url.scheme in ('http', 'https'):
        folder, name = hash_text(source)[:8], Path(url.path).name
        path = Path(get_dir(), 'checkpoints', folder, name)
    elif url.scheme == 'file':
        path = Path(url2pathname(url.path))
    return path if path.is_file() else None


def hash_file(path: Path) -> str:
    stat = path.stat()
    return _hash_file(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _hash_file(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def hash_data(config: Config) -> str:
    """Of the files that a config's data sets and metrics read.

    Annotations count by content, images by name and size alone: that is
    cheap, and images are hardly ever edited in place.
    """
    found = {
        str(path): hash_path(path) for path in data_paths(config.to_dict())
    }
    return hash_text(json.dumps(found, sort_keys=True))


def data_paths(config: Any, key: str = '') -> Iterator[Path]:
    """Annotation files and image folders named anywhere in a config."""
    if isinstance(config, list | tuple):
        for item in config:
            yield from data_paths(item)
    if not isinstance(config, Mapping):
        return
    root = str(config.get('data_root') or '')
    named = [
        config.get('ann_file'),
        *(config.get('data_prefix') or {}).values(),
    ]
    for name in named:
        if isinstance(name, str) and (root or name):
            yield Path(root, name)
    for value in config.values():
        yield from data_paths(value)


@functools.cache
def hash_path(path: Path) -> str:
    """Of a file or, recursively, a folder; empty if there is none."""
    if path.is_file():
        if path.suffix in TEXTS:
            return hash_file(path)
        return str(path.stat().st_size)
    if not path.is_dir():
        return ''
    files = {p.name: hash_path(p) for p in sorted(path.iterdir())}
    return hash_text(json.dumps(files))
