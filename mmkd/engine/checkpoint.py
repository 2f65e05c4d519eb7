"""Checkpoint files: reading them safely and keeping them stock.

A distilled checkpoint is a stock one: ``state_dict`` (and, with EMA,
``ema_state_dict``) hold the student under its stock names and nothing else.
What belongs to distillation lies under the separate key ``distillation``.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log

from mmkd.data.checkpoint_file import damage
from mmkd.errors import CheckpointError
from mmkd.utils import ATTACHED


def latest_checkpoint(folder: str) -> str | None:
    """The checkpoint of a training run that is to be resumed.

    It is the one that the file ``last_checkpoint`` names. Where that is
    missing or empty, or its checkpoint is damaged, it is the newest whole one
    in the folder.

    Returns:
        Its path; None in a folder without any.

    Raises:
        CheckpointError: If there are checkpoints, but none is whole.
    """
    pointer = Path(folder, 'last_checkpoint')
    named = pointer.read_text().strip() if pointer.is_file() else ''
    found = sorted(
        (p for p in Path(folder).glob('*.pth') if p.name[:5] != 'best_'),
        key=lambda p: p.stat().st_mtime_ns,
        reverse=True,
    )
    paths = [named] * bool(named) + [str(path) for path in found]
    damages: list[str] = []
    for path in paths:
        problem = None if '://' in path else damage(path)
        if problem is None:
            if path != named:
                print_log(
                    f'{pointer} {"is wrong" if named else "is missing"}'
                    f'{"".join(f"; {d}" for d in damages)}: the newest whole '
                    f'checkpoint is taken instead, {path}',
                    'current',
                    logging.WARNING,
                )
            return path
        damages.append(f'{path} {problem}')
    if damages:
        raise CheckpointError(
            f'nothing in {folder} can be resumed: {"; ".join(damages)}. '
            'Bring a whole checkpoint back, or empty the folder to start '
            'anew.'
        )
    return None


def split_checkpoint(checkpoint: dict[str, Any]) -> None:
    """Move distillation's weights out of the networks' state dicts.

    Changes ``checkpoint`` in place: ``state_dict`` and ``ema_state_dict``
    become stock, ``checkpoint['distillation']`` takes the rest.
    """
    kept = checkpoint.setdefault(ATTACHED, {})
    for key, prefix in _prefixes(checkpoint):
        states = checkpoint[key]
        kept[key] = {
            name: states.pop(name)
            for name in list(states)
            if name.startswith(prefix)
        }


def join_checkpoint(
    checkpoint: dict[str, Any],
    own: Mapping[str, torch.Tensor],
    *,
    resume: bool,
) -> None:
    """Put distillation's weights into the networks' state dicts, in place.

    Args:
        checkpoint: A checkpoint that :func:`split_checkpoint` has changed, or
            a stock one.
        own: The weights of the run that loads it, by their names in
            ``state_dict``. They stand in for those that the checkpoint does
            not have in their shape.
        resume: Let nothing stand in.

    Raises:
        CheckpointError: If the checkpoint to be resumed has other weights.
    """
    kept = checkpoint.get(ATTACHED, {})
    for key, prefix in _prefixes(checkpoint):
        mine = {
            prefix + name.removeprefix(f'{ATTACHED}.'): value
            for name, value in own.items()
        }
        saved = kept.get(key, {})
        if resume:
            _check_same_weights(mine, saved)
        fitting = {
            name: saved[name]
            for name in mine
            if name in saved and saved[name].shape == mine[name].shape
        }
        checkpoint[key].update({**mine, **fitting})


def _check_same_weights(
    own: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]
) -> None:
    shapes = [
        {name: tuple(value.shape) for name, value in weights.items()}
        for weights in (own, saved)
    ]
    names = sorted(
        name
        for name in {**own, **saved}
        if shapes[0].get(name) != shapes[1].get(name)
    )
    if names:
        first = names[0]
        expected, got = (s.get(first, 'nothing') for s in shapes)
        raise CheckpointError(
            'the checkpoint was saved with other distillation methods: '
            f'{len(names)} of their weights differ, the first is {first}: '
            f'expected {expected}, got {got}. Resume with the config it was '
            'saved with, or start from its student with load_from and '
            'without resume.'
        )


def _prefixes(checkpoint: dict[str, Any]) -> list[tuple[str, str]]:
    prefixes = {
        'state_dict': f'{ATTACHED}.',
        'ema_state_dict': f'module.{ATTACHED}.',
    }
    return [item for item in prefixes.items() if item[0] in checkpoint]
