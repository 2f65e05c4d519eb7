"""What to type once a training is complete."""

import os
import shlex
from pathlib import Path

from .checkpoint import latest_checkpoint


def next_steps(
    config: str,
    work_dir: str,
    *others: str,
    compare_with: str | None = None,
) -> list[str]:
    """Say which commands test, show and export what was trained.

    The best checkpoint is tested, if one was kept, or else the last.

    Args:
        config: The config of the run.
        work_dir: Its folder.
        others: Other folders that it saves checkpoints to.
        compare_with: The work dir of another run for the report.

    Returns:
        Lines; none without a checkpoint.

    Raises:
        CheckpointError: If there are checkpoints, but none is complete.
    """
    last = latest_checkpoint(work_dir, *others)
    if last is None:
        return []
    best = sorted(
        (p for f in (work_dir, *others) for p in Path(f).glob('best_*.pth')),
        key=lambda path: path.stat().st_mtime_ns,
    )
    checkpoint = short_path(str(best[-1])) if best else short_path(last)
    lines = [
        f'The best checkpoint is {checkpoint}, the last {short_path(last)}.'
    ]
    config = short_path(config)
    dirs = [short_path(each) for each in (compare_with, work_dir) if each]
    commands = (
        ['test', config, checkpoint],
        ['report', *dirs],
        ['export', config, checkpoint, '--onnx'],
    )
    return [
        *(lines if best else []),
        'Next:',
        *(f'  {shlex.join(["mmkd", *command])}' for command in commands),
    ]


def short_path(path: str) -> str:
    """Return a path from the current folder, if it leads into it."""
    if '://' in path:
        return path
    relative = os.path.relpath(path)
    return path if relative.startswith(os.pardir) else relative
