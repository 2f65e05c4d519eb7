"""Configs of data sets, of which some wrap others."""

from collections.abc import Iterator
from typing import Any


def wrapped(dataset: Any) -> list[Any]:
    """Return the data sets that one wraps; none if it reads files itself.

    ``ConcatDataset`` holds ``datasets``; ``RepeatDataset``,
    ``ClassBalancedDataset`` and ``MultiImageMixDataset`` a ``dataset``.

    Args:
        dataset: Its entry in a config.
    """
    inner = dataset.get('datasets') or dataset.get('dataset') or []
    return [*inner] if isinstance(inner, list | tuple) else [inner]


def leaves(dataset: Any) -> Iterator[Any]:
    """Yield the data sets that read files, within those that wrap them."""
    inner = wrapped(dataset)
    if not inner:
        yield dataset
    for each in inner:
        yield from leaves(each)
