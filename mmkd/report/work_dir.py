"""Read a training back from its work dir."""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmkd.data.checkpoint_file import damage
from mmkd.data.files import real_path
from mmkd.engine.checkpoint import latest_checkpoint, pointed_by
from mmkd.engine.logs import (
    by_step,
    complete_rows,
    main_metric,
    training_rows,
    validations,
)
from mmkd.errors import CheckpointError, ConfigError
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
    def class_aliases(self) -> dict[str, str]:
        """Names of classes that mean the same to its teachers."""
        distillation = self.config.get('distillation') or {}
        return dict(distillation.get('class_aliases') or {})

    @property
    def methods(self) -> dict[str, str]:
        """The types of its methods, but those of weight 0, by their names."""
        methods = (self.config.get('distillation') or {}).get('methods') or {}
        return {
            name: kind_of(options)
            for name, options in methods.items()
            if options.get('loss_weight') != 0
        }

    @property
    def by_epoch(self) -> bool:
        """Whether it is validated by epoch, else by iteration."""
        return 'max_iters' not in self.config.train_cfg

    @property
    def planned(self) -> int:
        """The epochs (or iterations) of the whole training."""
        key = 'max_epochs' if self.by_epoch else 'max_iters'
        return int(self.config.train_cfg[key])

    @property
    def reached(self) -> int | None:
        """The epochs (or iterations) before the checkpoint, if it is known.

        That of an interrupted run may have a name without a number; then the
        epoch that was logged last is not a whole one.
        """
        unit = 'epoch' if self.by_epoch else 'iter'
        if named := re.search(rf'{unit}_(\d+)\.pth', self.checkpoint):
            return int(named[1])
        logged = [*self.logged.get(unit, {}).values()]
        return int(logged[-1]) - self.by_epoch if logged else None

    @property
    def seed(self) -> int | None:
        """The seed that it has drawn, or was given."""
        found = re.search(r'^\s*seed: (\d+)', self.environment, re.M)
        given = (self.config.get('randomness') or {}).get('seed')
        return int(found[1]) if found else given


def kind_of(options: Any) -> str:
    """The name of a class that a config names by itself or as a text."""
    kind = options.get('type')
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]


def read_work_dirs(folders: Sequence[Path]) -> list[WorkDir]:
    """Read trainings, each with a name of its own.

    A folder that holds the work dirs of trainings stands for these: that of
    a study, or that of `mmkd distill`. Those without a checkpoint are left
    out there.

    Raises:
        ConfigError: If a folder holds no training or no checkpoint.
    """
    given = [each for f in folders for each in expanded(real_path(f))]
    names = short_names(given)
    return [
        read_work_dir(folder, name)
        for folder, name in zip(given, names, strict=True)
    ]


def expanded(folder: Path) -> list[Path]:
    """The work dirs in a folder, or the folder itself."""
    if configs_of(folder):
        return [folder]
    for level in ('*', '*/*'):
        inner = [each for each in folder.glob(level) if configs_of(each)]
        found = [
            each
            for each in sorted(inner)
            if last_checkpoint(each, Config.fromfile(configs_of(each)[-1]))
        ]
        if found:
            return found
    return [folder]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The ends of paths, as long as it takes to tell them apart."""
    for length in range(1, max(len(f.parts) for f in folders) + 1):
        names = ['/'.join(f.parts[-length:]) for f in folders]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f'{folders[0]} is given twice; give each work dir once.')


def configs_of(folder: Path) -> list[Path]:
    """The configs that a training has left in its work dir, oldest first."""
    return [
        path
        for path in sorted(folder.glob('*/vis_data/config.py'))
        if is_training(path.with_name('scalars.json'))
    ]


def read_work_dir(folder: Path, name: str) -> WorkDir:
    configs = configs_of(folder)
    if not configs:
        raise ConfigError(
            f'{folder} holds no training: expected the logs of `mmkd train`, '
            '<date>/vis_data/scalars.json and config.py. Give the work dir '
            'of a training.'
        )
    config = Config.fromfile(configs[-1])
    checkpoint = last_checkpoint(folder, config)
    if checkpoint is None:
        raise ConfigError(
            f'{folder} holds no checkpoint. Train until the first one is '
            'written, or bring it back.'
        )
    rows = list(training_rows(folder))
    return WorkDir(
        name=name,
        folder=folder,
        config=config,
        config_text=configs[-1].read_text(errors='replace'),
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


def last_checkpoint(folder: Path, config: Config) -> str | None:
    """The last checkpoint of a work dir, which may have been moved."""
    with suppress(CheckpointError):
        here = str(folder / Path(pointed_by(folder)).name)
        if damage(here) is None:
            return here
    saver = (config.get('default_hooks') or {}).get('checkpoint') or {}
    others = [saver['out_dir']] if saver.get('out_dir') else []
    return latest_checkpoint(str(folder), *others)


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
