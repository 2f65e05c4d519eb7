"""What a work dir of MMEngine tells of its training."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmkd.engine.checkpoint import latest_checkpoint
from mmkd.engine.logs import complete_rows
from mmkd.errors import ConfigError
from mmkd.peers.peer import with_trained_teacher

from .summary import Curves, read_curves

RULE = '-' * 60
"""The line above and below the environment in MMEngine's log."""


@dataclass
class Cost:
    """Of a training iteration, as logged; None where it was not."""

    iterations: int = 0
    seconds: float | None = None
    """Median."""
    data_seconds: float | None = None
    memory_mib: float | None = None
    """Peak of the GPU."""


@dataclass
class WorkDir:
    """A training, read back.

    Attributes:
        parts: Each loss by iteration, under its name in the log.
        telemetry: Gradient cosine by iteration, by method of distillation.
    """

    name: str
    folder: Path
    config: Config
    config_text: str
    checkpoint: str
    curves: Curves
    cost: Cost
    environment: str
    parts: dict[str, dict[int, float]] = field(default_factory=dict)
    telemetry: dict[str, dict[int, float]] = field(default_factory=dict)

    @property
    def teacher(self) -> Any:
        """The description of its frozen teachers; None without one."""
        distillation = self.config.get('distillation') or {}
        return with_trained_teacher(distillation).get('teacher')

    @property
    def distils(self) -> bool:
        """Whether it has a frozen teacher."""
        return bool(self.teacher)

    @property
    def by_epoch(self) -> bool:
        """Whether it is validated by epoch, else by iteration."""
        return 'max_iters' not in self.config.train_cfg


def read_work_dirs(folders: Sequence[Path]) -> list[WorkDir]:
    """Read trainings, each with a name of its own.

    Raises:
        ConfigError: If a folder holds no training or no checkpoint.
    """
    names = short_names([folder.resolve() for folder in folders])
    return [
        read_work_dir(folder.resolve(), name)
        for folder, name in zip(folders, names, strict=True)
    ]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The ends of paths, as long as it takes to tell them apart."""
    for length in range(1, max(len(f.parts) for f in folders) + 1):
        names = ['/'.join(f.parts[-length:]) for f in folders]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f'{folders[0]} is given twice; give each work dir once.')


def read_work_dir(folder: Path, name: str) -> WorkDir:
    starts = [path.parents[1] for path in scalar_files(folder)]
    starts = [
        path for path in starts if (path / 'vis_data/config.py').exists()
    ]
    if not starts:
        raise ConfigError(
            f'{folder} holds no training: expected the logs of '
            'mmkd train, <date>/vis_data/scalars.json and config.py. '
            'Give its --work-dir.'
        )
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        raise ConfigError(
            f'{folder} holds no checkpoint. Train to the first one, or '
            'bring it back.'
        )
    file = starts[-1] / 'vis_data' / 'config.py'
    rows = [
        row for path in scalar_files(folder) for row in complete_rows(path)
    ]
    return WorkDir(
        name=name,
        folder=folder,
        config=Config.fromfile(file),
        config_text=file.read_text(),
        checkpoint=checkpoint,
        curves=read_curves(folder),
        cost=read_cost(rows),
        environment=read_environment(starts[-1]),
        parts=read_parts(rows),
        telemetry=read_telemetry(rows),
    )


def last_checkpoint(folder: Path) -> str | None:
    """The last one of a work dir, also of one that was moved."""
    named = latest_checkpoint(str(folder))
    if named is None:
        return None
    here = folder / Path(named).name
    return str(here) if here.is_file() else named


def scalar_files(folder: Path) -> Iterator[Path]:
    """The logs of trainings, not of tests, from old to new."""
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        if any('loss' in row for row in complete_rows(path)):
            yield path


def read_cost(rows: Sequence[dict[str, Any]]) -> Cost:
    trained = [row for row in rows if 'loss' in row]

    def logged(key: str) -> list[float]:
        return [row[key] for row in trained if key in row]

    times, data = logged('time'), logged('data_time')
    return Cost(
        iterations=max((row['step'] for row in trained), default=0),
        seconds=statistics.median(times) if times else None,
        data_seconds=statistics.median(data) if data else None,
        memory_mib=max(logged('memory'), default=None),
    )


def read_parts(
    rows: Sequence[dict[str, Any]],
) -> dict[str, dict[int, float]]:
    """The losses that the total is the sum of."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if 'loss' in row:
            for key, value in row.items():
                if 'loss' in key and key != 'loss':
                    found.setdefault(key, {})[row['step']] = value
    return found


def read_telemetry(
    rows: Sequence[dict[str, Any]],
) -> dict[str, dict[int, float]]:
    """What :class:`mmkd.engine.hooks.TelemetryHook` has logged."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for key, value in row.items():
            parts = key.split('/')
            if parts[0] == 'distillation' and parts[-1] == 'cosine':
                method = '/'.join(parts[1:-1])
                found.setdefault(method, {})[row['step']] = value
    return found


def read_environment(start: Path) -> str:
    """The block that MMEngine writes at the head of each log."""
    for path in start.glob('*.log'):
        _, _, after = path.read_text(errors='replace').partition(RULE)
        return after.partition(RULE)[0].strip()
    return ''
