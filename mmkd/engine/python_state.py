"""What objects remember in plain attributes, for checkpoints.

A state dict holds parameters and buffers. Detectors, transforms and hooks
remember more: the current size of a random resize, thresholds that a RoI head
adapts, cached images, how long a metric has not risen. Here all attributes are
compared with what they were before the training, and what has changed is saved
and restored. A class leaves attributes out by naming them in ``not_resumed``.
"""

import hashlib
import itertools
import logging
import pickle
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.logging import MessageHub
from mmengine.runner import BaseLoop, Runner
from mmengine.visualization import Visualizer
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from .encoding import ATOMS, HELD, decode, encode

IGNORED = (
    *(Runner, BaseLoop, DataLoader, Optimizer, Config, MessageHub),
    *(Visualizer, logging.Logger, nn.Parameter, LazyAttr, LazyObject),
    *(type, types.ModuleType, types.FunctionType, types.MethodType),
    *(types.BuiltinFunctionType, torch.dtype, torch.device),
)
"""They are not memory, or have a state dict of their own."""
NOT_ENTERED = (
    *('builtins', 'torch', 'numpy', 'threading', '_thread', 'logging'),
    *('functools', 'weakref', 'pycocotools', 'rich'),
)
"""Packages whose objects are no memory of a training."""
CONTAINERS = (list, tuple, set, frozenset, deque)
CHANGEABLE = (list, dict, set, deque, np.ndarray, torch.Tensor, *HELD)
"""Where several places hold the same one, they share its changes."""
CLASS_VALUES = (bool, int, float, list, dict, set, deque)
"""Attributes of classes may be memory if they have these types."""
INTERNAL = frozenset(vars(nn.Module()))
"""What every nn.Module has: its state dict, its mode and its hooks."""
NO_MEMORY = frozenset(
    (
        *('data_list', 'data_bytes', 'data_address'),  # of data sets
        *('results', 'img_ids', 'cat_ids', 'dataset_meta'),  # of metrics
        *('_coco_api', '_lvis_api'),  # theirs, to which they add marks
        '_raw_positive_infos',  # of dense heads
    )
)
"""Attributes that come from the annotations or live for one step."""
LARGEST = 2**28
"""The bytes that a single attribute may take in a checkpoint."""
GONE = {'kind': 'gone'}
_differs = itertools.count()

Key = tuple[str, str, str]
"""The name of an object, the kind of the place, the name of the place."""


class Slot(NamedTuple):
    """A place that holds a value."""

    owner: Any
    kind: str
    """``'attribute'``, ``'class'`` (an attribute of a class), or of a module
    ``'child'``, ``'buffer'`` or ``'trained'`` (whether it trains)."""
    name: str

    def write(self, value: Any) -> None:
        if self.kind == 'child':
            self.owner._modules[self.name] = value
        elif self.kind == 'buffer':
            self.owner._buffers[self.name] = value
        elif self.kind == 'trained':
            self.owner._parameters[self.name].requires_grad_(value)
        elif self.kind == 'class':
            setattr(self.owner, self.name, value)
        else:  # whatever a class does when an attribute is set
            object.__setattr__(self.owner, self.name, value)

    def clear(self) -> None:
        delattr(self.owner, self.name)


class Changes(NamedTuple):
    """What has changed since the training began."""

    saved: list[list[Any]]
    """Name of the object, kind and name of the place, encoded value."""
    lost: list[str]
    """The places whose new values cannot be saved."""


class PythonState:
    """The attributes of objects, and of the objects that they refer to.

    Args:
        entered: Objects by name, in which modules are entered as well.
        others: Objects by name. The modules to which they refer are saved
            elsewhere, or are part of ``entered``.
        replaced: The names of attributes whose new objects somebody puts in
            place again before :meth:`restore`.
        outside: Objects by name that are referred to, but not entered.

    Example:
        >>> from types import SimpleNamespace
        >>> from mmkd.engine.python_state import PythonState
        >>> hook = SimpleNamespace(patience=5, waited=0)
        >>> state = PythonState({}, {'hook': hook})
        >>> hook.waited = 3
        >>> changes = state.changes()
        >>> changes.saved
        [['hook', 'attribute', 'waited', 3]]
        >>> again = SimpleNamespace(patience=7, waited=0)
        >>> PythonState({}, {'hook': again}).restore(changes.saved)
        []
        >>> again
        namespace(patience=7, waited=3)
    """

    def __init__(
        self,
        entered: Mapping[str, Any],
        others: Mapping[str, Any] | None = None,
        *,
        replaced: Iterable[str] = (),
        outside: Mapping[str, Any] | None = None,
    ) -> None:
        self.entered, self.others = entered, others or {}
        self.outside = outside or {}
        self.replaced = frozenset(replaced)
        self._known: dict[int, tuple[str, Callable[[], Any]]] = {}
        self._classes: dict[str, str] = {}
        walk = _Walk(self)
        self._digests = {
            key: _digest(walk.encode(key, value)[0])
            for key, _, value in walk.places()
        }
        for name, each in {**walk.objects, **self.outside}.items():
            self._known[id(each)] = name, _reference(each)
            self._classes[name] = _class(each)

    def name_of(self, value: Any) -> str | None:
        """Return the name that an object had at the beginning."""
        name, reference = self._known.get(id(value), ('', _nothing))
        return name if reference() is value else None

    def changes(self) -> Changes:
        """Return what has changed, and what of it cannot be saved."""
        walk, changes = _Walk(self), Changes([], [])
        places = list(walk.places())
        for key, slot, value in places:
            name, place = key[0], f'{key[0]}.{key[2]}'
            known = self.name_of(slot.owner) == name
            if not known and not self._restorable(_class(slot.owner), name):
                continue  # the place that refers to it is lost
            encoded, foreign = walk.encode(key, value)
            data = pickle.dumps(encoded, 5)
            if known and self._digests.get(key) == _digest(data):
                continue
            if encoded == {'kind': 'ignored'} or walk.outputs:
                continue
            if foreign and not known:
                continue  # as its class has made it, for all we know
            if len(data) > LARGEST:
                changes.lost.append(f'{place} ({len(data) >> 20} MiB)')
            elif foreign or not self._refers_to_restorable(encoded):
                changes.lost.append(f'{place} ({type(value).__name__})')
            else:
                changes.saved.append([*key, encoded])
        present = {key for key, _, _ in places}
        owners = {
            name
            for name, each in walk.objects.items()
            if self.name_of(each) == name
        }
        for key in sorted(self._digests.keys() - present):
            if key[0] in owners and key[1] == 'attribute':
                changes.saved.append([*key, GONE])
        return changes

    def _restorable(self, kind: str, name: str) -> bool:
        """Return whether a resumed run has an object of the class there."""
        return self._classes.get(name) == kind or any(
            name == each or name.startswith((f'{each}.', f'{each}['))
            for each in self.replaced
        )

    def _refers_to_restorable(self, encoded: Any) -> bool:
        if isinstance(encoded, list):
            return all(map(self._refers_to_restorable, encoded))
        if not isinstance(encoded, dict):
            return True
        if encoded['kind'] == 'object':
            return self._restorable(encoded['class'], encoded['name'])
        inner = encoded.get('items', encoded.get('state', []))
        return self._refers_to_restorable(inner)

    def restore(
        self, saved: Iterable[list[Any]], device: Any = 'cpu'
    ) -> list[str]:
        """Set what :meth:`changes` has found.

        Args:
            saved: What it has found, in this or another process.
            device: Where tensors go that were not on the CPU.

        Returns:
            The places that do not exist, or take no such value.
        """
        walk, missing = _Walk(self), []
        current = {key: value for key, _, value in walk.places()}

        def find(encoded: Mapping[str, Any]) -> Any:
            if encoded['kind'] == 'same':
                return current[tuple(encoded['place'])]
            found = walk.objects.get(str(encoded.get('name')))
            if found is None or _class(found) != encoded['class']:
                raise KeyError(encoded.get('name'))
            return found

        for owner, kind, name, encoded in saved:
            try:
                slot = Slot(walk.objects[owner], kind, name)
                if encoded == GONE:
                    slot.clear()
                    continue
                key = owner, kind, name
                value = current.get(key) if walk.is_first(key) else None
                current[key] = decode(encoded, find, value, device)
                slot.write(current[key])
            except (KeyError, AttributeError, TypeError, ValueError):
                missing.append(f'{owner}.{name}')
        return missing


class _Walk:
    """The objects that can be reached now, by name."""

    def __init__(self, state: PythonState) -> None:
        self.objects: dict[str, Any] = {}
        self._names = {id(each): name for name, each in state.outside.items()}
        self._slots: list[tuple[Key, Slot, Any]] = []
        self._same: dict[Key, Key] = {}
        self.outputs = False
        first: dict[int, Key] = {}
        todo = deque(
            (name, each, entered)
            for entered, roots in (
                (True, state.entered),
                (False, state.others),
            )
            for name, each in roots.items()
        )
        while todo:
            path, owner, entered = todo.popleft()
            if id(owner) in self._names:
                continue
            name = state.name_of(owner) or path
            while name in self.objects:
                name += '+'  # a new object where a known one has been
            self.objects[name] = owner
            self._names[id(owner)] = name
            for kind, place, value in _slots(owner):
                key = name, kind, place
                self._slots.append((key, Slot(owner, kind, place), value))
                if isinstance(value, CHANGEABLE):
                    holder = first.setdefault(id(value), key)
                    if holder != key:
                        self._same[key] = holder
                        continue
                todo.extend(
                    (f'{name}.{place}{suffix}', each, entered)
                    for suffix, each in _objects(value, entered)
                )
            if not isinstance(owner, type):
                todo.extend(
                    (_qualified(each), each, entered)
                    for each in type(owner).__mro__
                    if not _is_foreign(each)
                )

    def places(self) -> Iterator[tuple[Key, Slot, Any]]:
        """Return all places, with what they hold."""
        return iter(self._slots)

    def is_first(self, key: Key) -> bool:
        """Return whether no place before this one holds the same value."""
        return key not in self._same

    def encode(self, key: Key, value: Any) -> tuple[Any, bool]:
        """Return what a place holds, and whether it cannot be decoded.

        Afterwards ``outputs`` says whether it holds outputs of the last step,
        whose graph is gone: they are no memory.
        """
        foreign = self.outputs = False
        if key in self._same:
            return {'kind': 'same', 'place': list(self._same[key])}, False

        def other(value: Any) -> Any:
            nonlocal foreign
            name = self._names.get(id(value))
            if name is not None and not isinstance(value, type):
                return {'kind': 'object', 'name': name, 'class': _class(value)}
            foreign = True
            if isinstance(value, Iterator):  # nobody can tell how far it is
                return {'kind': 'opaque', 'id': next(_differs)}
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                self.outputs = True
            if isinstance(value, IGNORED) or _is_foreign(type(value)):
                return {'kind': 'ignored'}
            return {'kind': 'opaque', 'id': id(value)}

        return encode(value, other), foreign


def _slots(owner: Any) -> Iterator[tuple[str, str, Any]]:
    """Return kind, name and value of each place of an object."""
    if isinstance(owner, type):
        for name, value in list(vars(owner).items()):
            if type(value) in CLASS_VALUES and not name.startswith('__'):
                yield 'class', name, value
        return
    skipped = frozenset(getattr(type(owner), 'not_resumed', ()))
    if isinstance(owner, nn.Module):
        skipped |= INTERNAL
        for name, child in owner._modules.items():
            yield 'child', name, child
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                yield 'trained', name, parameter.requires_grad
        for name in sorted(owner._non_persistent_buffers_set):
            yield 'buffer', name, owner._buffers[name]
    for name, value in list(_attributes(owner).items()):
        if name not in skipped and name not in NO_MEMORY:
            yield 'attribute', name, value


def _attributes(owner: Any) -> dict[str, Any]:
    found = dict(getattr(owner, '__dict__', {}))
    for each in type(owner).__mro__:
        slots = vars(each).get('__slots__', ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ('__dict__', '__weakref__') and hasattr(
                owner, name
            ):
                found[name] = getattr(owner, name)
    return found


def _objects(value: Any, modules: bool) -> Iterator[tuple[str, Any]]:
    """Return the objects in nested containers that are to be entered."""
    if type(value) in ATOMS:
        return
    if isinstance(value, Mapping):
        for key, each in dict.items(value) if isinstance(value, dict) else ():
            if type(each) not in ATOMS:
                for suffix, found in _objects(each, modules):
                    yield f'[{key!r}]{suffix}', found
    elif isinstance(value, CONTAINERS):
        for index, each in enumerate(value):
            if type(each) not in ATOMS:
                for suffix, found in _objects(each, modules):
                    yield f'[{index}]{suffix}', found
    elif isinstance(value, nn.Module):
        if modules:
            yield '', value
    elif not (
        type(value) in HELD
        or isinstance(value, IGNORED)
        or _is_foreign(type(value))
    ) and (hasattr(value, '__dict__') or hasattr(value, '__slots__')):
        yield '', value


def _is_foreign(kind: type) -> bool:
    return kind.__module__.partition('.')[0] in NOT_ENTERED


def _qualified(kind: type) -> str:
    return f'{kind.__module__}.{kind.__qualname__}'


def _class(value: Any) -> str:
    return _qualified(type(value))


def _digest(encoded: Any) -> bytes:
    data = encoded if isinstance(encoded, bytes) else pickle.dumps(encoded, 5)
    return hashlib.blake2b(data, digest_size=16).digest()


def _reference(value: Any) -> Callable[[], Any]:
    """Return a weak reference: what is replaced may be large."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


def _nothing() -> None:
    return None
