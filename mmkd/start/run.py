"""What there is of a run in its folder, and what to type next."""

import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from mmkd.data.checkpoint_loader import OPT_IN
from mmkd.data.checkpoint_reader import read_checkpoint
from mmkd.engine.checkpoint import latest_checkpoint
from mmkd.engine.logs import training_rows
from mmkd.errors import CheckpointError

STARTED = re.compile(r'\d{8}_\d{6}')
"""The folder of a start's logs."""
SAVED = re.compile(r'(epoch_\d+|iter_\d+|best_.*|preempted)\.pth')
KEPT = 'overwritten'
"""Where ``--overwrite`` moves what a run has written."""


@dataclass
class Run:
    """A run that has been begun.

    Attributes:
        epoch: The epochs that are complete in its last checkpoint.
        iteration: The last iteration that was logged or saved.
        checkpoint: The last checkpoint; None if there is none yet.
        when: When the last of it was written.
    """

    folder: Path
    epoch: int
    iteration: int
    checkpoint: str | None
    when: datetime

    def is_finished(self, train_cfg: dict) -> bool:
        """Whether all epochs or iterations of a loop are done."""
        if self.checkpoint is None:
            return False
        if 'max_iters' in train_cfg:
            return self.iteration >= train_cfg['max_iters']
        return self.epoch >= train_cfg.get('max_epochs', 1)

    def in_words(self) -> str:
        saved = self.checkpoint or 'no checkpoint yet'
        return (
            f'iteration {self.iteration:,}, {saved}, last written '
            f'{self.when:%Y-%m-%d %H:%M}'
        )


def find_run(folder: Path) -> Run | None:
    """The run in a folder; None where nothing has been trained.

    A start that was ended before its first iteration was logged does not
    count: nothing of it could be lost.
    """
    written = _written(folder)
    steps = [
        row['step']
        for row in training_rows(folder)
        if 'loss' in row and type(row.get('step')) is int
    ]
    checkpoint = None
    epoch = iteration = 0
    with suppress(CheckpointError):
        checkpoint = latest_checkpoint(str(folder))
        if checkpoint is not None and '://' not in checkpoint:
            content = read_checkpoint(
                checkpoint, trust=False, opt_in=OPT_IN, lazily=True
            )
            meta = content.get('meta') or {}
            epoch, iteration = meta.get('epoch', 0), meta.get('iter', 0)
    if not steps and not any(p.suffix == '.pth' for p in written):
        return None
    times = [p.stat().st_mtime for p in written]
    logs = [p.stat().st_mtime for p in folder.glob('*/vis_data/scalars.json')]
    return Run(
        folder,
        epoch,
        max([iteration, *steps]),
        checkpoint,
        datetime.fromtimestamp(max([*times, *logs])),
    )


def _written(folder: Path) -> list[Path]:
    """What a run writes into its folder."""
    if not folder.is_dir():
        return []
    return [
        path
        for path in folder.iterdir()
        if path.name == 'last_checkpoint'
        or (STARTED.fullmatch(path.name) and path.is_dir())
        or SAVED.fullmatch(path.name)
    ]


def move_away(folder: Path, config: Path) -> Path | None:
    """Move what a run has written, and its config, out of the way.

    What was moved before goes. Other files in the folder stay.

    Returns:
        Where it is now; None if there was nothing.
    """
    found = [*_written(folder), *([config] if config.exists() else [])]
    if not found:
        return None
    kept = folder / KEPT
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    for path in found:
        path.rename(kept / path.name)
    return kept
