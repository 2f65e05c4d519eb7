"""The weights of one detector in what a checkpoint file holds."""

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping

from mmengine.logging import print_log
from torch import Tensor

from mmkd.errors import CheckpointError

WRAPPED = 'module'
"""Wrapped for distributed training, a model's keys begin with this."""


def stock_state(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    source: str,
    prefix: str | None = None,
) -> 'OrderedDict[str, Tensor]':
    """Return a detector's weights under their stock names.

    A wrapper for distributed training is taken off. So are the ``ema_*``
    buffers of MMDetection 2.x, which hold a second set of weights: at the end
    of an epoch, where its checkpoints are written, the averaged weights have
    the stock names and the buffers have those that were not averaged.

    Args:
        state: The state dict of the file.
        own: The state dict of the detector.
        source: The name of the file.
        prefix: What comes before the names of the detector, such as
            ``'student'`` in the file of a wrapper. Keys that do not begin
            with it are left out.

    Raises:
        CheckpointError: If no key begins with ``prefix``.
    """
    found = _below(state, WRAPPED, keep=True)
    if prefix:
        start = prefix.rstrip('.')
        inner = _below(state, start) or _below(found, start)
        if not inner:
            raise CheckpointError(
                f'the checkpoint {source} has no key that begins with '
                f'prefix={prefix!r}. {hint(found, own) or _starts(found)}'
            )
        found = _below(inner, WRAPPED, keep=True)
    buffers = {f'ema_{key.replace(".", "_")}' for key in own} - own.keys()
    left_out = [key for key in found if key in buffers]
    for key in left_out:
        del found[key]
    if left_out:
        print_log(
            f'{source} holds the buffers of an average of MMDetection 2.x: '
            f'{len(left_out)} keys such as {left_out[0]} are left out, and '
            'the weights beside them are taken. In files of whole epochs '
            'these are the averaged ones.',
            'current',
            logging.WARNING,
        )
    return found


def hint(state: Iterable[str], own: Iterable[str]) -> str:
    """Say what comes before a detector's names in a file that holds them.

    Args:
        state: The keys of the file.
        own: The keys of the detector.

    Returns:
        A sentence that offers the option ``prefix``; empty if nothing fits.
    """
    names = set(own)
    fitting: Counter[str] = Counter()
    for key in state:
        parts = key.split('.')
        for count in range(1, len(parts)):
            if '.'.join(parts[count:]) in names:
                fitting['.'.join(parts[:count])] += 1
    best = max(fitting.values(), default=0)
    if 2 * best < len(names):
        return ''
    likely = {p: n for p, n in fitting.most_common() if 2 * n > best}
    listed = ', '.join(
        f'"{p}." ({n} of {len(names)} keys fit)' for p, n in likely.items()
    )
    if len(likely) == 1:
        return (
            f'Its keys begin with {listed}: set prefix={next(iter(likely))!r} '
            'beside its path.'
        )
    return (
        f'It holds several networks, whose keys begin with {listed}: choose '
        f'one with prefix={next(iter(likely))!r} or another of these beside '
        'its path.'
    )


def _below(
    state: Mapping[str, Tensor], prefix: str, *, keep: bool = False
) -> 'OrderedDict[str, Tensor]':
    """Take a prefix off the keys; leave out, or keep, those without it."""
    start = f'{prefix}.'
    found = OrderedDict(
        (key.removeprefix(start), value)
        for key, value in state.items()
        if keep or key.startswith(start)
    )
    # The modules' versions, by which they rename keys of older versions.
    found._metadata = {  # type: ignore[attr-defined]
        '' if key == prefix else key.removeprefix(start): value
        for key, value in getattr(state, '_metadata', {}).items()
        if keep or key == prefix or key.startswith(start)
    }
    return found


def _starts(state: Iterable[str]) -> str:
    first = Counter(key.partition('.')[0] for key in state)
    listed = ', '.join(f'{name} ({n})' for name, n in first.most_common(6))
    return f'Its keys begin with {listed}.'
