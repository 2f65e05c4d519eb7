"""Read a training back from its work dir."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmkd.engine.checkpoint import latest_checkpoint
from mmkd.engine.logs import (
    by_step,
    complete_rows,
    main_metric,
    training_rows,
    validations,
)
from mmkd.errors import ConfigError
from mmkd.peers.peer import with_trained_teacher

RULE = '-' * 60
"""The line above and below the environment in MMEngine's log."""


@dataclass
class WorkDir:
    """A training, read back.

    Attributes:
        logged: Each value that was logged in training, by iteration.
        aps: The AP by epoch (or iteration), from 0 to 1, of the student under
            the name ``''``, and of each network that trained beside it.
        telemetry: Gradient cosine by iteration, by method of distillation.
    """

    name: str
    folder: Path
    config: Config
    config_text: str
    checkpoint: str
    environment: str
    logged: dict[str, dict[int, float]]
    aps: dict[str, dict[int, float]]
    telemetry: dict[str, dict[int, float]]

    @property
    def loss_parts(self) -> dict[str, dict[int, float]]:
        """The losses that the total is the sum of."""
        return {
            key: line
            for key, line in self.logged.items()
            if 'loss' in key and key != 'loss'
        }

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
    configs = [
        path
        for path in sorted(folder.glob('*/vis_data/config.py'))
        if is_training(path.with_name('scalars.json'))
    ]
    if not configs:
        raise ConfigError(
            f'{folder} holds no training: expected the logs of `mmkd train`, '
            '<date>/vis_data/scalars.json and config.py. Give the work dir '
            'of a training.'
        )
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        raise ConfigError(
            f'{folder} holds no checkpoint. Train until the first one is '
            'written, or bring it back.'
        )
    rows = list(training_rows(folder))
    return WorkDir(
        name=name,
        folder=folder,
        config=Config.fromfile(configs[-1]),
        config_text=configs[-1].read_text(),
        checkpoint=checkpoint,
        environment=read_environment(configs[-1].parents[1]),
        logged=by_step(row for row in rows if 'loss' in row),
        aps=read_aps(folder),
        telemetry={
            key.removeprefix('distillation/').removesuffix('/cosine'): line
            for key, line in by_step(rows).items()
            if key.startswith('distillation/') and key.endswith('/cosine')
        },
    )


def is_training(scalars: Path) -> bool:
    """Whether a log is that of a training; tests are logged alike."""
    return scalars.exists() and any(
        'loss' in row for row in complete_rows(scalars)
    )


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint of a work dir, which may have been moved."""
    named = latest_checkpoint(str(folder))
    if named is None:
        return None
    here = folder / Path(named).name
    return str(here) if here.is_file() else named


def read_aps(folder: Path) -> dict[str, dict[int, float]]:
    """See :attr:`WorkDir.aps`."""
    found: dict[str, dict[int, float]] = {'': {}}
    for step, metrics in validations(folder).items():
        main = f'/{main_metric(metrics)}'
        for key, value in metrics.items():
            if f'/{key}'.endswith(main):
                network = key.removesuffix(main[1:]).rstrip('/')
                found.setdefault(network, {})[step] = value
    return found


def read_environment(start: Path) -> str:
    """The block that MMEngine writes at the head of each log."""
    for path in start.glob('*.log'):
        _, _, after = path.read_text(errors='replace').partition(RULE)
        return after.partition(RULE)[0].strip()
    return ''
