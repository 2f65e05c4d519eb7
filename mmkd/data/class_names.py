"""Class names: how data sets spell them, and which a built data set has."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .coco import read_categories

ALIASES: tuple[tuple[str, ...], ...] = (
    ('airplane', 'aeroplane'),
    ('motorcycle', 'motorbike'),
    ('couch', 'sofa'),
    ('tv', 'tvmonitor', 'television', 'television set'),
    ('tv', 'moniter/tv', 'monitor/tv'),
    ('dining table', 'dinning table', 'kitchen & dining room table'),
    ('car', 'car (automobile)'),
    ('bus', 'bus (vehicle)'),
    ('train', 'train (railroad vehicle)'),
    ('fire hydrant', 'fireplug'),
    ('tie', 'necktie'),
    ('frisbee', 'flying disc'),
    ('skis', 'ski'),
    ('orange', 'orange (fruit)', 'orange/tangerine'),
    ('donut', 'doughnut'),
    ('laptop', 'laptop computer'),
    ('mouse', 'computer mouse', 'mouse (computer equipment)'),
    ('remote', 'remote control'),
    ('keyboard', 'computer keyboard'),
    ('cell phone', 'cellular telephone', 'mobile phone'),
    ('microwave', 'microwave oven'),
    ('hair drier', 'hair dryer'),
    ('handbag', 'handbag/satchel'),
    ('bowl', 'bowl/basin'),
)
"""Names of the same class in COCO (the first), VOC, LVIS, Open Images and
Objects365, in lower case. Names that differ only in case, spaces, underscores
and hyphens are the same without being listed (``pottedplant``, ``Potted
Plant``, ``potted_plant``)."""


def _letters(name: str) -> str:
    return re.sub(r'[\s_-]+', '', name.casefold())


_FIRST = {
    _letters(name): _letters(names[0]) for names in ALIASES for name in names
}


def spelling(name: str, aliases: Mapping[str, str] | None = None) -> str:
    """Return what all known spellings of a class have in common.

    Args:
        name: The name of a class.
        aliases: More names that mean the same, in addition to
            :data:`ALIASES`, such as ``dict(bike='bicycle')``.

    Example:
        >>> from mmkd.data.class_names import spelling
        >>> spelling('Dining_Table') == spelling('diningtable')
        True
        >>> spelling('sofa') == spelling('couch')
        True
        >>> spelling('settee', dict(settee='sofa')) == spelling('couch')
        True
    """
    return _speller(aliases)(name)


def _speller(aliases: Mapping[str, str] | None) -> Callable[[str], str]:
    """Return :func:`spelling` for given aliases."""
    first = _FIRST  # of all spellings that mean the same
    for name, other in (aliases or {}).items():
        letters, theirs = _letters(name), _letters(other)
        mine, common = first.get(letters, letters), first.get(theirs, theirs)
        moved = {k: common for k, v in first.items() if v == mine}
        first = {**first, **moved, mine: common, letters: common}

    def spell(name: str) -> str:
        letters = _letters(name)
        return first.get(letters, letters)

    return spell


def match_names(
    ours: Sequence[str],
    theirs: Sequence[str],
    aliases: Mapping[str, str] | None = None,
) -> dict[str, str | None]:
    """Return for each of our names the one of theirs that means the same.

    Equal names match first, then names with the same :func:`spelling`. A
    spelling that several of the remaining names of one side have is not
    decided here: such names match nothing.

    Args:
        ours: Class names, each once.
        theirs: Class names, each once.
        aliases: See :func:`spelling`.

    Returns:
        Every name of ``ours`` with its match or None.

    Example:
        >>> from mmkd.data.class_names import match_names
        >>> match_names(['sofa', 'cow'], ['Couch', 'person'])
        {'sofa': 'Couch', 'cow': None}
    """
    equal, spell = set(ours) & set(theirs), _speller(aliases)
    left = [
        _by_spelling((name for name in names if name not in equal), spell)
        for names in (ours, theirs)
    ]
    matches: dict[str, str | None] = {}
    for name in ours:
        mine, other = (side.get(spell(name), []) for side in left)
        alone = len(mine) == len(other) == 1
        matches[name] = other[0] if alone else None
        if name in equal:
            matches[name] = name
    return matches


def _by_spelling(
    names: Iterator[str], spell: Callable[[str], str]
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(spell(name), []).append(name)
    return found


# ------------------------------------------------------------ built data sets


def layers(dataset: Any) -> Iterator[Any]:
    """Yield a built data set and all that it wraps, however deeply nested.

    ``ConcatDataset`` holds ``datasets``; ``RepeatDataset``,
    ``ClassBalancedDataset``, ``MultiImageMixDataset`` and PyTorch's ``Subset``
    hold a ``dataset``.
    """
    yield dataset
    for each in _within(dataset):
        yield from layers(each)


def parts(dataset: Any) -> Iterator[Any]:
    """Yield the data sets that a built one wraps, however deeply nested.

    A data set that wraps none is its own only part.
    """
    return (each for each in layers(dataset) if not _within(each))


def _within(dataset: Any) -> Sequence[Any]:
    inner = getattr(dataset, 'datasets', None)
    if inner is None:
        inner = getattr(dataset, 'dataset', None)
        inner = [inner] if hasattr(inner, '__getitem__') else None
    return inner if isinstance(inner, list | tuple) else []


def named_classes(dataset: Any) -> tuple[str, ...] | None:
    """Return the class names in the ``metainfo`` of a data set, or None."""
    metainfo = getattr(dataset, 'metainfo', None)
    names = metainfo.get('classes') if isinstance(metainfo, Mapping) else None
    if not names:
        return None
    return (names,) if isinstance(names, str) else tuple(names)


def classes_of(dataset: Any) -> tuple[str, ...] | None:
    """Return the name of each label of a data set that wraps no other.

    They are those of its ``metainfo``, but in the order of the labels:
    MMDetection numbers the classes of COCO's format as the annotation file
    lists them, whatever the order in ``metainfo``. Classes that the file does
    not have come last.

    Returns:
        The names, or None if the data set has none.
    """
    names = named_classes(dataset)
    labels = getattr(dataset, 'cat2label', None)
    path = getattr(dataset, 'ann_file', None)
    if names is None or not labels or not isinstance(path, str):
        return names
    rows = read_categories(path)
    in_file = {row['id']: row['name'] for row in rows or ()}
    if not labels.keys() <= in_file.keys():
        return names
    by_label = [in_file[i] for i in sorted(labels, key=labels.__getitem__)]
    known = {spelling(name): name for name in names}
    first = [known.get(spelling(name), name) for name in by_label]
    return (*first, *(name for name in names if name not in first))


def all_classes_of(dataset: Any) -> tuple[str, ...] | None:
    """Return the class names of a data set and of all that it wraps.

    Parts may name fewer classes, if these are the first ones: labels are
    numbers, so the same number has to mean the same class in every part.

    Returns:
        The longest list of names, or None if no part has one.

    Raises:
        ValueError: If the same number is another class in another part. The
            arguments are the two lists of names.

    Example:
        >>> from types import SimpleNamespace as Set
        >>> from mmkd.data.class_names import all_classes_of
        >>> a = Set(metainfo={'classes': ('person',)})
        >>> b = Set(metainfo={'classes': ('person', 'cow')})
        >>> all_classes_of(Set(datasets=[a, Set(datasets=[b])]))
        ('person', 'cow')
    """
    named = [names for each in parts(dataset) if (names := classes_of(each))]
    if not named:
        return None
    longest = max(named, key=len)
    for names in named:
        same = zip(names, longest, strict=False)
        if any(spelling(a) != spelling(b) for a, b in same):
            raise ValueError(longest, names)
    return longest
