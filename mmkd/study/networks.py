"""The networks that a config of a study names, and their hashes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmkd.detectors.source import find_in_model_index, load_config
from mmkd.peers.peer import with_trained_teacher
from mmkd.teachers.build import descriptions

from .hashes import hash_file, hash_text, is_file, local_file
from .training import fingerprint


def distillation_of(config: Config) -> Mapping[str, Any]:
    """What a config says of it; a teacher that trains is a peer."""
    return with_trained_teacher(config.get('distillation') or {})


def teachers_of(config: Config) -> list[dict[str, Any]]:
    """The descriptions of a config's frozen teachers."""
    teacher = distillation_of(config).get('teacher')
    networks = descriptions(teacher).values() if teacher else ()
    return [as_described(network) for network in networks]


def as_described(network: Mapping[str, Any] | str) -> dict[str, Any]:
    """A network with its config and checkpoint, if it has but a name."""
    about = {'name': network} if isinstance(network, str) else dict(network)
    if 'name' in about:
        about = {**find_in_model_index(about.pop('name')), **about}
    return about


def source_of(about: Mapping[str, Any]) -> str:
    """The path or URL of a checkpoint; empty if there is none."""
    return str(about.get('checkpoint') or '')


def hash_source(source: str) -> str:
    """SHA-256 of a checkpoint's file, else of the text that names it."""
    if not source:
        return ''
    file = local_file(source)
    return hash_file(file) if file else hash_text(source)


def hash_network(network: Mapping[str, Any]) -> str:
    """Of a peer's config, if it is a file, and its first checkpoint.

    A URL counts as text: it is downloaded only when the run has begun.
    """
    about, theirs = as_described(network), ''
    if isinstance(about.get('config'), str):
        theirs = fingerprint(load_config(about['config']))
    source = source_of(about)
    if is_file(source):
        source = hash_file(Path(source))
    return f'{theirs} {source}'
