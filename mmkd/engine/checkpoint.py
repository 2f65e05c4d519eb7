"""Find the checkpoint to resume, and keep checkpoints stock.

A distilled checkpoint is a stock one: ``state_dict`` (and, with EMA,
``ema_state_dict``) hold the student under its stock names and nothing else.
What belongs to the distillation is under the separate key ``distillation``.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log

from mmkd.data.checkpoint_file import damage
from mmkd.errors import CheckpointError
from mmkd.utils import ATTACHED

LONGEST = 4096
"""The bytes of a path."""


def latest_checkpoint(folder: str, *others: str) -> str | None:
    """Find the checkpoint from which a training run resumes.

    It is the one that the file ``last_checkpoint`` names. If this file is
    missing or empty, names something outside of the run's folders, or its
    checkpoint is damaged, it is the newest complete checkpoint in the folder,
    and a warning says so.

    Args:
        folder: The folder of the run.
        others: Other folders that the run may save its checkpoints to, or
            addresses of them.

    Returns:
        The path of the checkpoint; None if the folder has none.

    Raises:
        CheckpointError: If there are checkpoints, but none is complete.
    """
    pointer = Path(folder, 'last_checkpoint')
    damages: list[str] = []
    try:
        named = pointed_by(folder)
        if named:
            _check_inside(named, (folder, *others))
    except CheckpointError as error:
        named = ''
        damages.append(str(error))
    found = sorted(
        (p for p in Path(folder).glob('*.pth') if p.name[:5] != 'best_'),
        key=lambda p: p.stat().st_mtime_ns,
        reverse=True,
    )
    paths = [named] * bool(named) + [str(path) for path in found]
    for path in paths:
        problem = None if '://' in path else damage(path)
        if problem is None:
            if path != named:
                print_log(
                    f'{pointer} {"is wrong" if damages else "is missing"}'
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
            f'{"; ".join(damages)}. Restore a complete checkpoint, name one '
            '(--resume CHECKPOINT), or empty the folder to start from the '
            'beginning.'
        )
    return None


def pointed_by(folder: str | Path) -> str:
    """Return what ``last_checkpoint`` in a folder names; empty for nothing.

    Raises:
        CheckpointError: If it is not one line of text.
    """
    pointer = Path(folder, 'last_checkpoint')
    if not pointer.is_file():
        return ''
    with pointer.open('rb') as file:
        content = file.read(LONGEST + 1)
    named = content.decode(errors='replace').strip()
    if len(content) > LONGEST or not named.isprintable() or '\ufffd' in named:
        raise CheckpointError(
            f'{pointer} does not hold the path of a checkpoint'
        )
    return named


def _check_inside(named: str, folders: Iterable[str]) -> None:
    """Refuse the path of a checkpoint that the run has not saved."""

    def place(path: str) -> Path:
        return Path(path) if '://' in path else Path(path).resolve()

    parent = place(str(Path(named).parent) if '://' not in named else named)
    if not any(parent.is_relative_to(place(str(f))) for f in folders):
        raise CheckpointError(
            f'it names {named}, where this run saves no checkpoints'
        )


def checkpoint_folders(hooks: Iterable[Hook]) -> list[str]:
    """Return where checkpoint hooks save, if not to the work dir."""
    return [
        str(hook.out_dir)
        for hook in hooks
        if isinstance(hook, CheckpointHook) and hook.out_dir
    ]


def check_resumable(content: Any, source: str) -> None:
    """Refuse a checkpoint without the state of a training.

    Raises:
        CheckpointError: If it holds only weights.
    """
    parts = content if isinstance(content, dict) else {}
    meta, hub = parts.get('meta'), parts.get('message_hub')
    if (
        not isinstance(meta, dict)
        or not all(type(meta.get(key)) is int for key in ('epoch', 'iter'))
        or not isinstance(hub, dict)
        or not all(
            isinstance(hub.get(key), dict)
            for key in ('log_scalars', 'runtime_info', 'resumed_keys')
        )
    ):
        raise CheckpointError(
            f'{source} holds only weights, and no state of a training to '
            'resume. Start from them with load_from and without resume.'
        )


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
