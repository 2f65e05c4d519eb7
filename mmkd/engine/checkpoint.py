"""Find the checkpoint to resume, and keep checkpoints stock.

A distilled checkpoint is a stock one: ``state_dict`` (and, with EMA,
``ema_state_dict``) hold the student under its stock names and nothing else.
What belongs to the distillation is under the separate key ``distillation``.
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
    """Find the checkpoint from which a training run resumes.

    It is the one that the file ``last_checkpoint`` names. If this file is
    missing or empty, or its checkpoint is damaged, it is the newest complete
    checkpoint in the folder, and a warning says so.

    Args:
        folder: The folder of the run.

    Returns:
        The path of the checkpoint; None if the folder has none.

    Raises:
        CheckpointError: If there are checkpoints, but none is complete.
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
                    f'{"".join(f"; {d}" for d in damages)}. The run resumes '
                    f'from the newest complete checkpoint instead, {path}.',
                    'current',
                    logging.WARNING,
                )
            return path
        damages.append(f'{path} {problem}')
    if damages:
        raise CheckpointError(
            f'no checkpoint in {folder} can be resumed: '
            f'{"; ".join(damages)}. Restore a complete checkpoint, or empty '
            'the folder to start from the beginning.'
        )
    return None


def split_checkpoint(checkpoint: dict[str, Any]) -> None:
    """Move the distillation's weights out of the student's state dicts.

    The function changes the checkpoint in place: ``state_dict`` and
    ``ema_state_dict`` become stock, and ``checkpoint['distillation']`` takes
    the rest.

    Args:
        checkpoint: A checkpoint of a student with its distillation.

    Example:
        >>> import torch
        >>> from mmkd.engine.checkpoint import split_checkpoint
        >>> weight = torch.ones(1)
        >>> states = {'conv.weight': weight, 'distillation.a.weight': weight}
        >>> checkpoint = {'state_dict': states}
        >>> split_checkpoint(checkpoint)
        >>> list(checkpoint['state_dict'])
        ['conv.weight']
        >>> list(checkpoint['distillation']['state_dict'])
        ['distillation.a.weight']
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
    """Put the distillation's weights into the student's state dicts.

    The function changes the checkpoint in place.

    Args:
        checkpoint: A checkpoint that :func:`split_checkpoint` has changed, or
            a stock one.
        own: The distillation's weights in the run that loads the checkpoint,
            by their names in ``state_dict``. They are used where the
            checkpoint has no weight of the same name and shape.
        resume: Require that the checkpoint has all of them.

    Raises:
        CheckpointError: If the run resumes and the weights differ.
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
