"""Hashes of what a training depends on: configs, data, checkpoints, code."""

import contextlib
import functools
import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from mmengine.config import Config
from torch.hub import get_dir

import mmkd
from mmkd.detectors.source import find_in_model_index, load_config
from mmkd.peers.peer import with_trained_teacher
from mmkd.teachers.build import descriptions

PACKAGES = (
    'mmkd', 'torch', 'onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection',
    'mmengine', 'mmcv', 'mmdet', 'numpy', 'pycocotools', 'ensemble-boxes',
    'scikit-learn',
)  # fmt: skip
APPLICATIONS = ('benchmark', 'doctor', 'export', 'report', 'start', 'study')
"""Folders of mmkd whose code no training and no test runs."""
TEXTS = ('.json', '.xml', '.txt', '.csv')

# ------------------------------------------------------- code and packages


@functools.cache
def hash_code(root: Path = Path(mmkd.__file__).parent) -> str:
    """Hash the Python files that train and test, by name and content."""
    files = {
        str(path.relative_to(root)): hash_file(path)
        for path in sorted(root.rglob('*.py'))
        if path.relative_to(root).parts[0] not in APPLICATIONS
    }
    return hash_text(json.dumps(files))


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed."""
    found = {'python': platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


# ------------------------------------------------------------------ networks


def distillation_of(config: Config) -> Mapping[str, Any]:
    """Return ``distillation``, in which a teacher that trains is a peer."""
    return with_trained_teacher(config.get('distillation') or {})


def teachers_of(config: Config) -> list[dict[str, Any]]:
    """Return the descriptions of a config's frozen teachers."""
    teacher = distillation_of(config).get('teacher')
    networks = descriptions(teacher).values() if teacher else ()
    return [as_described(network) for network in networks]


def as_described(network: Mapping[str, Any] | str) -> dict[str, Any]:
    """Put config and checkpoint in the place of a name."""
    about = {'name': network} if isinstance(network, str) else dict(network)
    if 'name' in about:
        about = {**find_in_model_index(about.pop('name')), **about}
    return about


def source_of(about: Mapping[str, Any]) -> str:
    """Return the path or URL of a checkpoint; empty if there is none."""
    return str(about.get('checkpoint') or '')


def hash_config(config: Config, *others: str) -> str:
    """Hash a config and the hashes of the configs that it names."""
    text = json.dumps(config.to_dict(), sort_keys=True, default=repr)
    digest = hashlib.sha256(text.encode())
    for other in others:
        digest.update(hashlib.sha256(other.encode()).digest())
    return digest.hexdigest()


def hash_named_config(about: Mapping[str, Any]) -> str:
    """Hash the config of a network, if that is a file of its own."""
    named = about.get('config')
    return hash_config(load_config(named)) if isinstance(named, str) else ''


def hash_source(source: str) -> str:
    """Hash a checkpoint's file, or else the text that names it."""
    if not source:
        return ''
    file = local_file(source)
    return hash_file(file) if file else hash_text(source)


def hash_peers(config: Config) -> str | None:
    """Hash the configs and first checkpoints of a config's peers, if any.

    A URL counts as text: it is downloaded only when the run has begun.
    """
    texts = []
    for network in (distillation_of(config).get('peers') or {}).values():
        about = as_described(network)
        source = source_of(about)
        if '://' not in source and Path(source).is_file():
            source = hash_file(Path(source))
        texts.append(f'{hash_named_config(about)} {source}')
    return hash_text(' '.join(texts)) if texts else None


def local_file(source: str) -> Path | None:
    """Return the file of a checkpoint; None if there is none (yet).

    That of a URL is where :func:`.load_checkpoint_file` puts the download.
    """
    url = urlparse(source)
    path = Path(source).expanduser()
    if url.scheme in ('http', 'https'):
        folder, name = hash_text(source)[:8], Path(url.path).name
        path = Path(get_dir(), 'checkpoints', folder, name)
    elif url.scheme == 'file':
        path = Path(url2pathname(url.path))
    return path if path.is_file() else None


# --------------------------------------------------------------- data, files


def hash_data(config: Config) -> str:
    """Hash the files that a config's data sets and metrics read.

    Annotations count by content, images by name and size alone: that is
    cheap, and images are hardly ever edited in place.
    """
    paths = data_paths(config.to_dict())
    found = {str(path): hash_path(path) for path in paths}
    return hash_text(json.dumps(found, sort_keys=True))


def data_paths(config: Any) -> Iterator[Path]:
    """Yield the annotation files and image folders that a config names."""
    if isinstance(config, list | tuple):
        for item in config:
            yield from data_paths(item)
    if not isinstance(config, Mapping):
        return
    root = str(config.get('data_root') or '')
    prefixes = (config.get('data_prefix') or {}).values()
    for name in (config.get('ann_file'), *prefixes):
        if isinstance(name, str) and (root or name):
            yield Path(root, name)
    for value in config.values():
        yield from data_paths(value)


@functools.cache
def hash_path(path: Path) -> str:
    """Hash a file or, recursively, a folder; empty if there is none."""
    if path.is_file():
        if path.suffix in TEXTS:
            return hash_file(path)
        return str(path.stat().st_size)
    if not path.is_dir():
        return ''
    files = {p.name: hash_path(p) for p in sorted(path.iterdir())}
    return hash_text(json.dumps(files))


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
