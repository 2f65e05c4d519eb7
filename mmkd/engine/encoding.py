"""Python values as numbers, texts and bytes, so that a checkpoint holds them.

What is read from a checkpoint is built from these and from a few classes of
MMDetection and MMEngine that only hold data. Reading it therefore runs no code
of the file's choice.
"""

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torch import Tensor

ATOMS = (type(None), bool, int, float, complex, str, bytes)
"""Values of these types, and lists, stand for themselves."""
SEQUENCES: dict[str, Any] = {
    each.__name__: each for each in (tuple, set, frozenset, deque, torch.Size)
}
MAPPINGS: dict[str, Any] = {
    each.__name__: each
    for each in (dict, OrderedDict, Counter, defaultdict, ConfigDict)
}
FACTORIES = {each.__name__: each for each in (list, dict, set, int, float)}
"""What a defaultdict may start its entries with."""
STRUCTURES: dict[str, Any] = {
    each.__name__: each
    for each in (
        *(BaseDataElement, InstanceData, PixelData, DetDataSample),
        *(HorizontalBoxes, BitmapMasks, PolygonMasks, HistoryBuffer),
    )
}
"""Classes that only hold data, as caches of images contain them."""
GENERATORS: dict[str, Any] = {
    f'{each.__module__}.{each.__name__}': each
    for each in (
        *(random.Random, np.random.RandomState),
        *(np.random.Generator, torch.Generator),
    )
}
LABELS = {
    each: label
    for table in (SEQUENCES, MAPPINGS, STRUCTURES, GENERATORS)
    for label, each in table.items()
}
"""The kind under which an object of a type is encoded."""
GLOBAL = np.random.mtrand._rand
"""NumPy's global generator, whose state is saved with the random states."""
HELD = (*STRUCTURES.values(), *GENERATORS.values())
"""Objects that are encoded themselves."""


def encode(value: Any, other: Callable[[Any], Any]) -> Any:
    """Encode a value.

    Args:
        value: Numbers, texts, arrays, tensors, random generators, the
            structures of MMEngine and MMDetection, and containers of them,
            nested as they like.
        other: Is called with any other object; encodes it.

    Returns:
        Numbers, texts, bytes, and lists and dicts of them. Every dict in it
        has a ``kind``.

    Example:
        >>> from mmkd.engine.encoding import decode, encode
        >>> encoded = encode({(1, 2): [0.5]}, repr)
        >>> encoded['kind'], encoded['items'][0][1]
        ('dict', [0.5])
        >>> decode(encoded, str)
        {(1, 2): [0.5]}
    """
    if type(value) in ATOMS:
        return value
    if type(value) is list:
        return [encode(each, other) for each in value]
    kind = LABELS.get(type(value), '')
    plain: dict[str, Any] | None = None
    if kind in SEQUENCES:
        items = [encode(each, other) for each in value]
        plain = dict(items=items, maxlen=getattr(value, 'maxlen', None))
    elif kind in MAPPINGS:
        factory = getattr(value, 'default_factory', None)
        if factory is None or FACTORIES.get(factory.__name__) is factory:
            items = [
                [encode(key, other), encode(each, other)]
                for key, each in _items(value)
            ]
            plain = dict(items=items, factory=factory and factory.__name__)
    elif kind in STRUCTURES:
        plain = dict(state=encode(vars(value), other))
    elif kind in GENERATORS and value is not GLOBAL:
        plain = dict(state=encode(_state(value), other))
    elif type(value) is Tensor:
        kind, plain = 'Tensor', _encode_tensor(value)
    elif type(value) is np.ndarray or isinstance(value, np.generic):
        plain = _encode_array(value)
    elif isinstance(value, Path):
        kind, plain = 'Path', dict(path=str(value))
    return other(value) if plain is None else {'kind': kind, **plain}


def decode(
    encoded: Any,
    other: Callable[[Any], Any],
    current: Any = None,
    device: torch.device | str = 'cpu',
) -> Any:
    """Decode what :func:`encode` has made.

    Args:
        encoded: The result of :func:`encode`.
        other: Is called with what the ``other`` of :func:`encode` has
            returned.
        current: A value that is changed in place, if it has the same type.
        device: Where tensors go that were not on the CPU.

    Returns:
        The value, which is ``current`` where that was changed in place.
    """
    if type(encoded) in ATOMS:
        return encoded
    if type(encoded) is list:
        items = [decode(each, other, device=device) for each in encoded]
        return _refilled(current, items, list)
    kind = encoded.get('kind')
    if kind in SEQUENCES:
        items = [decode(e, other, device=device) for e in encoded['items']]
        if kind == 'deque':
            new: Any = deque(items, encoded['maxlen'])
            same = getattr(current, 'maxlen', None) == new.maxlen
            return _refilled(current if same else None, new, deque)
        return SEQUENCES[kind](items)
    if kind in MAPPINGS:
        pairs = [
            [decode(key, other), decode(value, other, device=device)]
            for key, value in encoded['items']
        ]
        if kind == 'defaultdict':
            factory = encoded['factory']
            new = defaultdict(factory and FACTORIES[factory])
        else:
            new = MAPPINGS[kind]()
        _fill(new, pairs)
        return _refilled(current, new, MAPPINGS[kind])
    if kind in STRUCTURES:
        structure = object.__new__(STRUCTURES[kind])
        vars(structure).update(decode(encoded['state'], other, device=device))
        return structure
    if kind in GENERATORS:
        state = decode(encoded['state'], other)
        if type(current) is not GENERATORS[kind]:
            current = _new_generator(kind, state)
        _set_state(current, state)
        return current
    if kind == 'Tensor':
        tensor = _decode_tensor(encoded)
        return tensor if encoded['device'] == 'cpu' else tensor.to(device)
    if kind in ('ndarray', 'scalar'):
        data, dtype = bytearray(encoded['bytes']), np.dtype(encoded['dtype'])
        array: Any = np.ndarray(tuple(encoded['shape']), dtype, data)
        return array if kind == 'ndarray' else array[()]
    return Path(encoded['path']) if kind == 'Path' else other(encoded)


def _refilled(current: Any, new: Any, kind: Any) -> Any:
    """Return ``current`` with the content of ``new``, if it is of its kind."""
    if type(current) is not kind:
        return new
    current.clear()
    if isinstance(new, dict):
        _fill(current, _items(new))
    else:
        current.extend(new)
    return current


def _items(value: Any) -> Iterable[Any]:
    """Return the items as they are: a ConfigDict would convert them."""
    return dict.items(value) if type(value) is ConfigDict else value.items()


def _fill(value: Any, items: Iterable[Any]) -> None:
    as_they_are = type(value) is ConfigDict
    for key, each in items:
        if as_they_are:
            dict.__setitem__(value, key, each)
        else:
            value[key] = each


def _encode_tensor(value: Tensor) -> dict[str, Any] | None:
    if value.layout is not torch.strided or value.is_quantized:
        return None
    if value.grad_fn is not None:
        return None  # an output of the last step, and no memory
    # A copy whose only stride is 1: that of no element, or of one, may be 0.
    data = torch.empty(value.numel(), dtype=value.dtype)
    data.copy_(value.detach().reshape(-1))
    return dict(
        dtype=str(value.dtype).removeprefix('torch.'),
        shape=list(value.shape),
        bytes=data.view(torch.uint8).numpy().tobytes(),
        device=value.device.type,
    )


def _decode_tensor(encoded: Mapping[str, Any]) -> Tensor:
    dtype = getattr(torch, encoded['dtype'])
    if not encoded['bytes']:
        return torch.empty(encoded['shape'], dtype=dtype)
    data = torch.frombuffer(bytearray(encoded['bytes']), dtype=dtype)
    return data.reshape(encoded['shape'])


def _encode_array(value: Any) -> dict[str, Any] | None:
    if value.dtype.hasobject or value.dtype.names:
        return None
    return dict(
        kind='ndarray' if type(value) is np.ndarray else 'scalar',
        dtype=value.dtype.str,
        shape=list(value.shape),
        bytes=value.tobytes(),
    )


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state()


def _new_generator(kind: str, state: Any) -> Any:
    if kind.endswith('.Generator') and isinstance(state, Mapping):
        name = state['bit_generator']
        if name not in ('PCG64', 'PCG64DXSM', 'MT19937', 'Philox', 'SFC64'):
            raise TypeError(f'{name} is no generator of NumPy')
        return np.random.Generator(getattr(np.random, name)())
    return GENERATORS[kind]()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
