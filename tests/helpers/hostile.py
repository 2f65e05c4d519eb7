"""Checkpoints that somebody has made to do harm."""

import zipfile
from pathlib import Path
from typing import Any

import torch


class RunsCode:
    """A pickle that creates a file when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


class Calls:
    """A pickle that calls a function when it is read."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None):
        self.parts = function, arguments, state

    def __reduce__(self) -> tuple[Any, ...]:
        function, arguments, state = self.parts
        return (function, arguments, *([] if state is None else [state]))


def checkpoint(path: Path, **parts: Any) -> Path:
    """A file with weights, and what a training needs to resume."""
    content = {
        'state_dict': {'w': torch.ones(2)},
        'meta': {'epoch': 1, 'iter': 4},
        'message_hub': dict(log_scalars={}, runtime_info={}, resumed_keys={}),
        **parts,
    }
    torch.save(content, path)
    return path


def changed(path: Path, change: Any, **options: Any) -> Path:
    """Write an archive again, with other members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w', **options) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name.partition('/')[2], content))
    return path
