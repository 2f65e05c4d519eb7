"""The file of a study: the runs that it describes."""

import copy
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmkd.data.files import real_path
from mmkd.detectors.source import load_config
from mmkd.errors import ConfigError
from mmkd.peers.peer import TRAINED_TEACHER
from mmkd.teachers.build import kind_of
from mmkd.utils import check_options, nearest

from .file import (
    Options,
    check_folder_name,
    check_length,
    check_study,
    is_tested,
    read_yaml,
)
from .grid import baselines, expand
from .inputs import distillation_of, teachers_of
from .pretraining import Pretraining, read_pretrainings
from .run import STUDENT, Run, Tested

METRICS = {
    'AP': 'coco/bbox_mAP',
    'AP50': 'coco/bbox_mAP_50',
    'AP75': 'coco/bbox_mAP_75',
}
ADDED = (
    'auto_scale_lr', 'custom_hooks', 'env_cfg', 'load_from', 'log_processor',
)  # fmt: skip
"""What a run's options may add to a config that does not have it."""
OUTPUTS = (
    'work_dir', 'out_dir', 'out_file_path', 'outfile_prefix', 'save_dir',
)  # fmt: skip
"""Options of hooks, metrics and the like that say where they write."""


@dataclass
class Study:
    """A grid of networks and seeds."""

    name: str
    work_dir: Path
    seeds: list[int]
    baseline: str | None
    metrics: dict[str, str]
    baselines: dict[str, str] = field(default_factory=dict)
    """Each network to the one that it is compared with, on its data."""
    pretrainings: dict[str, Pretraining] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    """By network, then seed; what another needs comes before it."""

    @property
    def networks(self) -> list[str]:
        return list(dict.fromkeys(run.network for run in self.runs))

    def of(self, network: str) -> list[Run]:
        return [run for run in self.runs if run.network == network]


# ----------------------------------------------------------------- the file


def read_study(path: Path) -> Study:
    """Read a study's YAML file.

    Raises:
        ConfigError: If it is wrong: what, where, and what would be right.
    """
    return study_of(read_yaml(path), str(path), path.stem)


def study_of(content: Any, where: str, name: str) -> Study:
    """Return the study that the content of a file describes.

    Args:
        content: What a study's file holds.
        where: The file, for messages.
        name: The study's name, where the content has none.

    Raises:
        ConfigError: See :func:`read_study`.
    """
    check_study(content, where)
    networks, data = content['runs'], content.get('data', {})
    name = content.get('name', name)
    if 'work_dir' not in content:
        check_folder_name(where, name)
    work_dir = Path(content.get('work_dir', f'work_dirs/studies/{name}'))
    study = Study(
        name=name,
        work_dir=real_path(work_dir),
        seeds=content.get('seeds', [0]),
        baseline=content.get('baseline'),
        metrics=dict(content.get('metrics', METRICS)),
    )
    study.pretrainings = read_pretrainings(
        content.get('pretrain', {}), study.work_dir
    )
    rows = expand(networks, data, where)
    study.baselines = baselines(
        study.baseline, [*rows.values()], networks, f'{where}: baseline'
    )
    for row in rows:
        check_length(f'{where}: runs', row)
    given = {name: row.options for name, row in rows.items()}
    for network in in_order(given, where):
        kind = tested_runs if is_tested(given[network]) else trained_runs
        here = f'{where}: runs.{network}'
        study.runs += kind(study, network, given[network], here)
    return study


def trained_runs(
    study: Study, network: str, options: Options, where: str
) -> Iterator[Run]:
    """Yield the runs of a network, by seed."""
    config = resolve(options, where)
    if 'pretrained' in options and 'backbone' not in config.model:
        raise ConfigError(
            f'{where}: {options["config"]} has no model.backbone, which could '
            'begin with what is pretrained. Leave "pretrained" out.'
        )
    check_outputs(options.get('options', {}), study.work_dir, where)
    for seed in options.get('seeds', study.seeds):
        own = copy.deepcopy(config)
        own.merge_from_dict({'randomness.seed': seed})
        teacher = None
        if 'teacher' in options:
            teacher = teacher_run(study, options['teacher'], seed, where)
        pretrained = study.pretrainings.get(options.get('pretrained', ''))
        yield Run(network, seed, study.work_dir, own, teacher, pretrained)


def tested_runs(
    study: Study, network: str, options: Options, where: str
) -> Iterator[Run]:
    """Yield the tests of a run's peer or ensemble, by seed."""
    sources = study.of(options['of'])
    members = read_members(options, sources[0].config, where)
    for run in sources:
        yield Tested(
            *(network, run.seed, study.work_dir, run.config),
            source=run,
            members=members,
        )


def teacher_run(study: Study, name: str, seed: int, where: str) -> Run:
    """Return the teacher of the same seed, or the only one."""
    runs = {run.seed: run for run in study.of(name)}
    if seed in runs:
        return runs[seed]
    if len(runs) == 1:
        return next(iter(runs.values()))
    raise ConfigError(
        f'{where}.teacher: the run "{name}" is to teach seed {seed}, but has '
        f'the seeds {sorted(runs)}. Give it that seed, or only one seed, '
        'which then teaches all.'
    )


def read_members(options: Options, config: Config, where: str) -> list[str]:
    """Return the names of the networks that are tested together."""
    peers = list(distillation_of(config).get('peers') or {})
    if 'network' in options:
        key, members, known = 'network', [options['network']], peers
    else:
        key, members = 'ensemble', options['ensemble']
        known = [STUDENT, *peers]
    for name in members:
        if name not in known:
            hint = nearest(str(name), known) if known else 'It has no peers.'
            raise ConfigError(
                f'{where}.{key}: there is no such network "{name}" in the '
                f'run "{options["of"]}". {hint}'
            )
    return members


def in_order(networks: Mapping[str, Options], where: str) -> Iterator[str]:
    """Yield the networks as given, but each after the one that it needs."""
    waiting = {n: o.get('of', o.get('teacher')) for n, o in networks.items()}
    while waiting:
        ready = [n for n, need in waiting.items() if need not in waiting]
        if not ready:
            raise ConfigError(
                f'{where}: {", ".join(waiting)} are, by one another, their '
                'own teachers.'
            )
        yield ready[0]
        del waiting[ready[0]]


# --------------------------------------------------------------- the configs


def resolve(options: Options, where: str) -> Config:
    """Return the config of a run with its options."""
    try:
        config = load_config(options['config'])
    except ConfigError as error:
        raise ConfigError(f'{where}: {error}') from error
    changes = dict(options.get('options', {}))
    check_options(
        f'{where}.options: {options["config"]}',
        (key.partition('.')[0] for key in changes),
        {*config, *ADDED} - {'work_dir'},
    )
    try:
        config.merge_from_dict(changes)
        config.pop('work_dir', None)
        if 'teacher' in options:
            make_room_for_teacher(config, options['config'])
        teachers_of(config)
        distillation_of(config).get('peers')
    except ConfigError as error:
        raise ConfigError(f'{where}: {error}') from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f'{where}.options do not fit {options["config"]}: {error!r}, got '
            f'{reprlib.repr(changes)}. '
            'Give each key of the config a value of the kind that it has '
            'there.'
        ) from error
    return config


def check_outputs(options: Options, work_dir: Path, where: str) -> None:
    """Refuse options by which a run would write elsewhere."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            check_outputs(value, work_dir, where)
        elif isinstance(value, list):
            check_outputs(
                {str(i): v for i, v in enumerate(value)}, work_dir, where
            )
        elif str(key).rpartition('.')[2] in OUTPUTS and isinstance(value, str):
            path = real_path(value)
            if not path.is_relative_to(work_dir):
                raise ConfigError(
                    f'{where}.options: {key}={value} leads to {path}, which '
                    f'is out of the work dir {work_dir}. Give a path in it, '
                    'or leave the option out.'
                )


def make_room_for_teacher(config: Config, where: str) -> None:
    """Drop what a run replaces of the config's one frozen teacher."""
    trouble = ''
    distillation = config.get('distillation')
    teacher = (distillation or {}).get('teacher') or {}
    if distillation is None:
        trouble = 'has no `distillation` to use it'
    elif kind_of(teacher) != 'FrozenDetector':
        trouble = 'describes several teachers'
    elif TRAINED_TEACHER in (distillation_of(config).get('peers') or {}):
        trouble = 'trains its own in the same step (trainable=True)'
    if trouble:
        raise ConfigError(
            f'{where} {trouble}, so that the run cannot have a teacher. Leave '
            '"teacher" out, or give a config with one frozen teacher.'
        )
    about = {} if isinstance(teacher, str) else dict(teacher)
    about.pop('name', None)
    config.distillation.teacher = about
