"""What a training is made with, to be compared when it is resumed."""

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import mmcv
import mmdet
import mmengine
import torch
from mmengine.config import Config
from torch import Tensor, nn

import mmkd
from mmkd.core.distiller import Distiller
from mmkd.teachers.disk_cache import fast_hash

SECTIONS = (
    *('distillation', 'model', 'train_dataloader', 'train_cfg'),
    *('optim_wrapper', 'param_scheduler', 'custom_hooks', 'auto_scale_lr'),
)
"""The parts of the config that decide what a training computes."""
PACKAGES = (torch, mmcv, mmengine, mmdet, mmkd)
LONGEST = 60
"""The characters of a value in a message."""
MOST = 20
"""The number of differences in a message."""


class Provenance:
    """Config, teachers' weights and code of a training.

    Args:
        cfg: The config of the run.
        distiller: What it distils; None for plain training.
        objects: Other objects whose classes decide what is computed. Of a
            class that is in no package of OpenMMLab, PyTorch or mmkd, the
            file is hashed.
    """

    def __init__(
        self,
        cfg: Config,
        distiller: Distiller | None = None,
        objects: Iterable[Any] = (),
    ) -> None:
        self._config = {
            name: _plain(cfg[name]) for name in SECTIONS if cfg.get(name)
        }
        self._distiller = distiller
        methods = distiller.methods.values() if distiller else ()
        self._code = dict(_code((*methods, *objects)))
        self._hashes: dict[str, tuple[Any, str]] = {}

    def facts(self) -> dict[str, Any]:
        """Return what can be compared: texts, in nested dicts and lists."""
        return {
            **self._config,
            'code': self._code,
            'weights': {
                name: self._hash(name, model)
                for name, model in _teachers(self._distiller)
            },
        }

    def _hash(self, name: str, model: nn.Module) -> str:
        """Return the hash of weights; only what has changed is read again."""
        weights = model.state_dict()
        seen = [(w.data_ptr(), _version(w)) for w in weights.values()]
        known = self._hashes.get(name)
        if known is None or known[0] != seen:
            digest = fast_hash(b'')
            for key, value in weights.items():
                digest.update(f'{key} {value.dtype} {value.shape}'.encode())
                digest.update(_bytes(value))
            known = self._hashes[name] = seen, digest.hexdigest()
        return known[1]


def differences(old: Any, new: Any, path: str = '') -> list[str]:
    """Return each difference between two :meth:`Provenance.facts`.

    Example:
        >>> from mmkd.engine.provenance import differences
        >>> old = {'kd': {'weight': '1.0'}, 'hint': {'weight': '2.0'}}
        >>> differences(old, {'kd': {'weight': '0.5'}})
        ["hint: {'weight': '2.0'} → nothing", 'kd.weight: 1.0 → 0.5']
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = sorted({**old, **new})
        parts = [
            (f'{path}.{name}'.lstrip('.'), old.get(name), new.get(name))
            for name in names
        ]
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return [f'{path}: {_short(old)} → {_short(new)}']
        parts = [
            (f'{path}[{index}]', *both)
            for index, both in enumerate(zip(old, new, strict=True))
        ]
    else:
        equal = old == new
        return [] if equal else [f'{path}: {_short(old)} → {_short(new)}']
    return [
        each
        for name, before, now in parts
        for each in differences(before, now, name)
    ]


def described(found: list[str]) -> str:
    """Return differences as one text, the first ones if there are many."""
    more = len(found) - MOST
    return '; '.join(found[:MOST]) + (f'; and {more} more' if more > 0 else '')


def _short(value: Any) -> str:
    text = 'nothing' if value is None else str(value)
    return text if len(text) <= LONGEST else f'{text[:LONGEST]}…'


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return f'{value.__module__}.{value.__qualname__}'
    return str(value)


def _code(objects: Iterable[Any]) -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        yield package.__name__, str(package.__version__)  # TorchVersion
    yield 'the files of mmkd', _mmkd()
    for kind in {type(each) for each in objects}:
        if kind.__module__.partition('.')[0] in {
            package.__name__ for package in PACKAGES
        }:
            continue
        try:
            file = inspect.getsourcefile(kind)
        except TypeError:  # of the interactive interpreter
            continue
        if file is not None and Path(file).is_file():
            digest = fast_hash(Path(file).read_bytes()).hexdigest()
            yield f'the file of {kind.__qualname__}', digest


@functools.cache
def _mmkd() -> str:
    folder = Path(mmkd.__file__).parent
    digest = fast_hash(b'')
    for path in sorted(folder.rglob('*.py')):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _teachers(distiller: Distiller | None) -> Iterator[tuple[str, nn.Module]]:
    """Return the networks that are not in a checkpoint, by their names."""
    if distiller is None:
        return
    for label, teacher in distiller.teacher.each().items():
        networks = teacher.networks
        for name, each in (networks or {'teacher': teacher}).items():
            full = f'{label}.{name}'.lstrip('.')
            for part, module in vars(each).items():
                if isinstance(module, nn.Module):
                    yield (
                        (full if part == 'model' else f'{full}.{part}'),
                        module,
                    )


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _bytes(weight: Tensor) -> Any:
    flat = weight.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy()
