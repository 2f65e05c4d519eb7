"""Read a checkpoint without running what it holds.

A checkpoint is a pickle, and a pickle can call any function while it is read.
PyTorch reads weights alone (``weights_only``). What MMEngine's trainings save
besides is read here by stand-ins, which are the only things that are called:
neither NumPy's constructors, which trust what a pickle says of memory, nor
``getattr``, by which MMEngine saves the methods of its log histories.
"""

import io
import mmap
import os
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch.serialization import (
    add_safe_globals,
    clear_safe_globals,
    get_safe_globals,
    get_unsafe_globals_in_checkpoint,
)

from mmkd.errors import CheckpointError

from .files import path_hint

NUMBERS = re.compile('[biufcSU][0-9]{1,6}')
"""NumPy's names of numbers and texts; objects and records are left out."""
UNPACKED = 4
"""How many times as large as its file a checkpoint may be in memory. PyTorch
does not compress."""
SLACK = 2**26
"""The bytes that any file may unpack to."""
NAMED = 4
"""How many functions and classes a message names."""
PREPARED = ('mobilenet_v2', 'imagenet.pth')
"""The weights that ``mmkd prepare`` makes: their folder and file."""
COUNTED = b'\nbytearray\n'
"""How a pickle asks for memory by a number instead of bringing it."""


class _Dtype:
    """Stands in for ``numpy.dtype``."""

    def __init__(self, name: Any, *_: Any) -> None:
        if not isinstance(name, str) or not NUMBERS.fullmatch(name):
            raise pickle.UnpicklingError(f'GLOBAL numpy.dtype({name!r})')
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ('<', '>'):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for ``numpy.ndarray``, until :func:`_finished`."""

    __hash__ = None  # type: ignore[assignment]
    array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        self.array = _from_bytes(kind, shape, data, 'F' if fortran else 'C')


class _History(HistoryBuffer):
    """A log history, which becomes MMEngine's if it holds nothing else."""

    def __init__(self) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        length = state['max_length']
        values, counts = state['_log_history'], state['_count_history']
        known = {'max_length', '_log_history', '_count_history'}
        if (
            not isinstance(length, int)
            or not isinstance(values, _Array)
            or not isinstance(counts, _Array)
            or not set(state) <= known | {'statistics_methods'}
        ):
            raise pickle.UnpicklingError(f'class HistoryBuffer({state})')
        self.max_length = length
        self._log_history, self._count_history = values.array, counts.array
        self._set_default_statistics()
        self.__class__ = HistoryBuffer


def _array(*_: Any) -> _Array:
    return _Array()


def _scalar(kind: Any, data: Any) -> Any:
    return _from_bytes(kind, (), data)[()]


def _from_bytes(
    kind: Any, shape: Any, data: Any, order: Any = 'C'
) -> np.ndarray:
    if not isinstance(kind, _Dtype) or not isinstance(data, bytes):
        raise pickle.UnpicklingError('GLOBAL numpy.ndarray of objects')
    memory = bytearray(data)
    array: Any = np.ndarray(shape, kind.dtype, memory, 0, None, order)
    if array.nbytes != len(data):
        raise ValueError(f'an array has {len(data)} bytes, not {array.nbytes}')
    return array.astype(kind.dtype.newbyteorder('='), copy=False)


def _method(owner: Any, name: Any) -> str:
    """Stands in for ``getattr``: log histories get their methods anyway."""
    if owner is not _History or not isinstance(name, str):
        raise pickle.UnpicklingError(f'GLOBAL builtins.getattr({owner})')
    return name


def _no_bytes() -> bytes:
    """Stands in for ``bytes``, which a pickle calls where there are none."""
    return b''


ALLOWED: list[tuple[Callable, str]] = [
    (slice, 'builtins.slice'),
    (_History, 'mmengine.logging.history_buffer.HistoryBuffer'),
    (_method, 'builtins.getattr'),
    (_method, '__builtin__.getattr'),
    (_no_bytes, 'builtins.bytes'),
    (_no_bytes, '__builtin__.bytes'),
    (_Array, 'numpy.ndarray'),
    (_Dtype, 'numpy.dtype'),
    *(
        (stand_in, f'numpy.{core}.multiarray.{name}')
        for core in ('_core', 'core')
        for name, stand_in in (('_reconstruct', _array), ('scalar', _scalar))
    ),
]
"""What is read besides weights, by the names in the file."""


def read_checkpoint(
    file: str | io.BytesIO,
    *,
    name: str = '',
    trust: bool = False,
    opt_in: str = 'next to its path',
    map_location: Any = 'cpu',
    lazily: bool = False,
) -> Any:
    """Read what ``torch.save`` has written.

    Args:
        file: The path of a file on this machine, or its content.
        name: What the content is called in messages.
        trust: Whether to unpickle whatever the file holds.
        opt_in: Where the user can set ``trust_checkpoint``, for the message.
        map_location: Where the tensors go; see :func:`torch.load`.
        lazily: Whether to read a tensor only when it is used, from the file,
            which then must not change.

    Returns:
        Tensors, numbers, texts, NumPy's arrays and numbers, MMEngine's
        histories, and containers of them. With ``trust`` it may be anything.

    Raises:
        CheckpointError: If the file is missing, damaged, no checkpoint, takes
            much more memory than its size, or needs ``trust``.
    """
    if isinstance(file, str):
        _check_file(file)
    name = name or str(file)
    with _opened(file) as content:
        size = content.seek(0, os.SEEK_END)
        try:
            zipped = _check_start(content, name, size, trust)
            with _allowed():
                read = torch.load(
                    file,
                    map_location=map_location,
                    weights_only=not trust,
                    mmap=lazily and zipped,
                )
            return read if trust else _finished(read)
        except CheckpointError:
            raise
        except Exception as error:  # a crafted file may cause any
            if isinstance(error, pickle.UnpicklingError) and not trust:
                message = _refusal(file, name, str(error), opt_in)
            else:
                message = _unreadable(name, size, error)
            raise CheckpointError(message) from None


@contextmanager
def _allowed() -> Iterator[None]:
    """Let PyTorch read what is allowed here, and what the user allows."""
    given, ours = get_safe_globals(), {name for _, name in ALLOWED}
    others = [
        each
        for each in given
        if (
            each[1]
            if isinstance(each, tuple)
            else f'{each.__module__}.{each.__qualname__}'
        )
        not in ours
    ]
    try:
        clear_safe_globals()
        add_safe_globals([*others, *ALLOWED])
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(given)


def _check_file(path: str) -> None:
    if os.path.isdir(path):
        raise CheckpointError(
            f'the checkpoint {path!r} is a folder. {path_hint(path)}Give the '
            'file in it.'
        )
    if not os.path.isfile(path):
        remedy = (
            f'{path_hint(path)}Give the path or URL of the trained weights, '
            'or None for an untrained network in a smoke test.'
        )
        if Path(path).parts[-2:] == PREPARED:
            remedy = 'Run `mmkd prepare mobilenet_v2`.'
        raise CheckpointError(
            f'the checkpoint {path!r} does not exist (working folder '
            f'{os.getcwd()}). {remedy}'
        )


@contextmanager
def _opened(file: str | io.BytesIO) -> Iterator[IO[bytes]]:
    if isinstance(file, io.BytesIO):
        yield file
        file.seek(0)
        return
    with open(file, 'rb') as content:
        yield content


def _check_start(file: IO[bytes], name: str, size: int, trust: bool) -> bool:
    """Check what can be told at once; return whether it is an archive."""
    file.seek(0)
    start = file.read(12)
    file.seek(0)
    if start[:2] == b'PK':
        _check_archive(file, name, size)
        return True
    if trust or name.endswith('.safetensors'):
        return False
    if start[:1] != b'\x80':
        # PyTorch's own words advise users to read what may run code.
        raise ValueError(f'it begins with {start!r}')
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(COUNTED) >= 0:
            raise pickle.UnpicklingError('GLOBAL builtins.bytearray')
    return False


def _check_archive(file: IO[bytes], name: str, size: int) -> None:
    """Refuse an archive that is not what PyTorch writes.

    Nothing but its table of contents is read, and the pickle of it, which is
    small.
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        if unpacked > UNPACKED * size + SLACK:
            raise CheckpointError(
                f'{name} ({size:,} bytes) would unpack to {unpacked:,} bytes '
                'and is not read. PyTorch does not compress checkpoints: get '
                'the file from its authors again, or save it with torch.save.'
            )
        names = [member.filename.rpartition('/')[2] for member in members]
        if 'constants.pkl' in names:
            raise CheckpointError(
                f'{name} is a TorchScript archive, which is a program and no '
                'checkpoint. Give a file with the state_dict of the network.'
            )
        for member, last in zip(members, names, strict=True):
            if last == 'data.pkl' and COUNTED in archive.read(member):
                raise pickle.UnpicklingError('GLOBAL builtins.bytearray')
    file.seek(0)


def _finished(content: Any) -> Any:
    """Put arrays in the place of their stand-ins."""
    done: dict[int, Any] = {}

    def finish(value: Any) -> Any:
        if type(value) is _Array:
            if value.array is None:
                raise ValueError('an array has no content')
            return value.array
        if type(value) not in (dict, OrderedDict, Counter, list, tuple):
            return value
        if id(value) in done:
            return done[id(value)]
        if type(value) is tuple:
            items = tuple(finish(each) for each in value)
            same = all(a is b for a, b in zip(items, value, strict=True))
            done[id(value)] = value if same else items
            return done[id(value)]
        done[id(value)] = value
        pairs = enumerate(value) if type(value) is list else value.items()
        for key, each in list(pairs):
            value[key] = finish(each)
        return value

    return finish(content)


def _refusal(
    file: str | io.BytesIO, name: str, error: str, opt_in: str
) -> str:
    held: list[str] = []
    with suppress(Exception), _allowed():  # it may be of the old format
        held = sorted(get_unsafe_globals_in_checkpoint(file))
    if len(held) > NAMED:
        held[NAMED:] = [f'and {len(held) - NAMED} more']
    if not held:
        pattern = r'(?:GLOBAL|class|function|operand) (\S+)'
        held = re.findall(pattern, error)[:1]
    return (
        f'{name} holds more than weights'
        f'{" (" * bool(held)}{", ".join(held)}{")" * bool(held)} and is not '
        'read, because a pickle can run code. If you trust where it comes '
        f'from, set trust_checkpoint=True {opt_in}.'
    )


def _unreadable(name: str, size: int, error: Exception) -> str:
    reason = str(error) or type(error).__name__
    first = reason.splitlines()[0].partition('. ')[0].rstrip('.')
    return (
        f'{name} ({size:,} bytes) is no PyTorch checkpoint or is truncated: '
        f'{first}. Download or copy it again and compare its size or sha256.'
    )
