"""The file of a study: the runs that it describes."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config

from mmkd.detectors.source import load_config
from mmkd.errors import ConfigError
from mmkd.peers.peer import TRAINED_TEACHER
from mmkd.teachers.build import kind_of
from mmkd.utils import check_options, nearest

from .grid import (
    AXES,
    Row,
    baselines,
    check_axes,
    check_name,
    check_variants,
    expand,
    is_tested,
)
from .networks import distillation_of, teachers_of
from .run import STUDENT, Run, Tested

METRICS = {
    'AP': 'coco/bbox_mAP',
    'AP50': 'coco/bbox_mAP_50',
    'AP75': 'coco/bbox_mAP_75',
}
STUDY_OPTIONS = (
    'name', 'work_dir', 'seeds', 'baseline', 'metrics', 'data', 'runs',
)  # fmt: skip
ADDED = (
    'auto_scale_lr', 'custom_hooks', 'env_cfg', 'load_from', 'log_processor',
)  # fmt: skip
"""What a run's options may add to a config that does not have it."""
RUN_OPTIONS = ('config', 'teacher', 'options', 'seeds', *AXES)
MERGE = 'tag:yaml.org,2002:merge'
TESTED_OPTIONS = ('of', 'network', 'ensemble')


@dataclass
class Study:
    """A grid of networks and seeds."""

    name: str
    work_dir: Path
    seeds: list[int]
    baseline: str | None
    metrics: dict[str, str]
    baselines: dict[str, str] = field(default_factory=dict)
    """By network, the one that it is compared with: that has its data."""
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
    content = read_yaml(path)
    where = str(path)
    if not isinstance(content, Mapping):
        raise ConfigError(
            f'{where} must hold {", ".join(STUDY_OPTIONS)}; see '
            'studies/bccd_frcnn.yaml.'
        )
    check_options(where, content, STUDY_OPTIONS)
    networks = content.get('runs')
    if not isinstance(networks, Mapping) or not networks:
        raise ConfigError(
            f'{where}: runs must map a name to its config, such as '
            f'"student: {{config: mmkd::bccd/student.py}}"; got '
            f'{networks!r}.'
        )
    name = str(content.get('name', path.stem))
    study = Study(
        name=name,
        work_dir=Path(content.get('work_dir', f'work_dirs/studies/{name}')),
        seeds=read_seeds(content.get('seeds', [0]), where),
        baseline=content.get('baseline'),
        metrics=read_metrics(content.get('metrics', METRICS), where),
    )
    study.work_dir = study.work_dir.expanduser().resolve()
    rows = read_rows(content, where)
    study.baselines = baselines(
        study.baseline, [*rows.values()], networks, f'{where}: baseline'
    )
    given = {name: row.options for name, row in rows.items()}
    for network in in_order(given, where):
        options, here = given[network], f'{where}: runs.{network}'
        if is_tested(options):
            study.runs += tested_runs(study, network, options, here)
        else:
            study.runs += trained_runs(study, network, options, here)
    return study


def read_rows(content: Mapping[str, Any], where: str) -> dict[str, Row]:
    """What the runs of the file stand for, by name."""
    networks, data = content['runs'], content.get('data', {})
    if 'data' in content:
        check_variants(f'{where}: data', data)
    for network, options in networks.items():
        here = f'{where}: runs.{network}'
        check_name(here, network)
        check_run(here, options, networks, data)
    return expand(networks, data, where)


def trained_runs(
    study: Study, network: str, options: Mapping[str, Any], where: str
) -> Iterator[Run]:
    """A network's runs, by seed."""
    config = resolve(options, where)
    for seed in read_seeds(options.get('seeds', study.seeds), where):
        own = copy.deepcopy(config)
        own.merge_from_dict({'randomness.seed': seed})
        teacher = None
        if 'teacher' in options:
            teacher = teacher_run(study, options['teacher'], seed, where)
        yield Run(network, seed, study.work_dir, own, teacher)


def tested_runs(
    study: Study, network: str, options: Mapping[str, Any], where: str
) -> Iterator[Tested]:
    """For each seed of a run, the test of its peer or ensemble."""
    sources = study.of(options['of'])
    members = read_members(options, sources[0].config, where)
    for source in sources:
        yield Tested(
            network,
            source.seed,
            study.work_dir,
            source.config,
            source=source,
            members=members,
        )


def teacher_run(study: Study, name: str, seed: int, where: str) -> Run:
    """The teacher of the same seed, or the only one."""
    runs = {run.seed: run for run in study.of(name)}
    if seed in runs:
        return runs[seed]
    if len(runs) == 1:
        return next(iter(runs.values()))
    raise ConfigError(
        f'{where}.teacher: the run "{name}" is to teach seed {seed}, but has '
        f'the seeds {sorted(runs)}. Give it that seed, or one seed alone, '
        'which then teaches all.'
    )


class UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not an override.

    A merge (``<<``) follows YAML's rule: a mapping's own keys come before
    merged ones, and of several merged mappings the first one wins. Releases
    of PyYAML differ in that.
    """

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f'"{key}" is given twice', node.start_mark
                )
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        own = [pair for pair in node.value if pair[0].tag != MERGE]
        sources = [value for key, value in node.value if key.tag == MERGE]
        node.value = own  # so that a mapping that merges itself ends
        super().flatten_mapping(node)
        merged: list[Any] = []
        for source in sources:
            several = isinstance(source, yaml.SequenceNode)
            for mapping in reversed(source.value) if several else [source]:
                if not isinstance(mapping, yaml.MappingNode):
                    raise yaml.constructor.ConstructorError(
                        None,
                        None,
                        'expected a mapping, or a list of mappings, to merge',
                        mapping.start_mark,
                    )
                self.flatten_mapping(mapping)
                merged += mapping.value
        # The last one of equal keys is kept.
        node.value = merged + own


def read_yaml(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f'the study {path} does not exist.')
    try:
        return yaml.load(path.read_text(), UniqueKeys)
    except yaml.YAMLError as error:
        raise ConfigError(f'{path} is no YAML: {error}') from error


def read_seeds(seeds: Any, where: str) -> list[int]:
    numbers = isinstance(seeds, list) and all(type(s) is int for s in seeds)
    if not numbers or not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f'{where}: seeds must be a list of different whole numbers, such '
            f'as [0, 1, 2]; got {seeds!r}.'
        )
    return seeds


def read_metrics(metrics: Any, where: str) -> dict[str, str]:
    texts = isinstance(metrics, Mapping) and all(
        isinstance(text, str) for pair in metrics.items() for text in pair
    )
    if not texts or not metrics:
        raise ConfigError(
            f'{where}: metrics must map a heading to a metric, such as '
            f'"AP: coco/bbox_mAP"; got {metrics!r}.'
        )
    return dict(metrics)


def check_run(
    where: str,
    options: Any,
    networks: Mapping[str, Any],
    data: Mapping[str, Any],
) -> None:
    if is_tested(options):
        check_tested(where, options, networks)
        return
    if not isinstance(options, Mapping) or 'config' not in options:
        raise ConfigError(
            f'{where} must be a mapping with a "config", or with the run '
            f'"of" which it tests a network; got {options!r}.'
        )
    check_options(where, options, RUN_OPTIONS)
    check_axes(where, options, data)
    for key, names in (
        ('teacher', [options.get('teacher')]),
        ('teachers', options.get('teachers', [])),
    ):
        for name in names:
            check_trained(name, networks, f'{where}.{key}')
    if not isinstance(options.get('options', {}), Mapping):
        raise ConfigError(
            f'{where}.options must map keys of the config to values, such as '
            f'"train_cfg.max_epochs: 24"; got {options["options"]!r}.'
        )


def check_trained(name: Any, networks: Mapping[str, Any], where: str) -> None:
    if is_tested(networks.get(name)):
        raise ConfigError(
            f'{where}: "{name}" is not trained by itself, it is of the run '
            f'"{networks[name]["of"]}". Name a run with a config.'
        )


def check_tested(
    where: str, options: Mapping[str, Any], networks: Mapping[str, Any]
) -> None:
    own = [key for key in RUN_OPTIONS if key in options]
    if own:
        raise ConfigError(
            f'{where} is of another run, whose networks it tests; it cannot '
            f'have {", ".join(own)} of its own. Leave "of" or these out.'
        )
    check_options(where, options, TESTED_OPTIONS)
    check_trained(options['of'], networks, f'{where}.of')
    if ('network' in options) == ('ensemble' in options):
        raise ConfigError(
            f'{where} needs either "network", the name of a peer, or '
            f'"ensemble", a list of names; got {dict(options)!r}.'
        )


def read_members(
    options: Mapping[str, Any], config: Config, where: str
) -> list[str]:
    """The names of the networks that are tested, together or the one."""
    peers = list(distillation_of(config).get('peers') or {})
    if 'network' in options:
        members, known = [options['network']], peers
        where = f'{where}.network'
    else:
        members, known = options['ensemble'], [STUDENT, *peers]
        where = f'{where}.ensemble'
        if not isinstance(members, list) or not 1 < len(members) == len(
            set(map(str, members))
        ):
            raise ConfigError(
                f'{where} must be a list of different networks, such as '
                f'{known}; got {members!r}.'
            )
    for name in members:
        if name not in known:
            hint = nearest(str(name), known) if known else 'It has no peers.'
            raise ConfigError(
                f'{where}: there is no such network "{name}" in the run '
                f'"{options["of"]}". {hint}'
            )
    return members


def in_order(networks: Mapping[str, Any], where: str) -> Iterator[str]:
    """The networks as given, but each after the one that it needs."""
    needs = {n: o.get('of', o.get('teacher')) for n, o in networks.items()}
    waiting, done = list(networks), {None}
    while waiting:
        ready = [n for n in waiting if needs[n] in done]
        if not ready:
            raise ConfigError(
                f'{where}: {", ".join(waiting)} are, by one another, their '
                'own teachers.'
            )
        yield ready[0]
        done.add(ready[0])
        waiting.remove(ready[0])


def resolve(options: Mapping[str, Any], where: str) -> Config:
    """The config of a run with its options."""
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
    config.merge_from_dict(changes)
    config.pop('work_dir', None)
    if 'teacher' in options:
        make_room_for_teacher(config, options, where)
    try:
        teachers_of(config)
    except ConfigError as error:
        raise ConfigError(f'{where}: {error}') from error
    return config


def make_room_for_teacher(
    config: Config, options: Mapping[str, Any], where: str
) -> None:
    """Keep of a config's one frozen teacher what is not in its run."""
    if 'distillation' not in config:
        raise ConfigError(
            f'{where} has a teacher, but {options["config"]} has no '
            '`distillation` to use it.'
        )
    teacher = config.distillation.get('teacher') or {}
    if kind_of(teacher) != 'FrozenDetector':
        raise ConfigError(
            f'{where} has a teacher, but {options["config"]} describes '
            'several teachers. Leave it out, or give a config of one.'
        )
    if TRAINED_TEACHER in (distillation_of(config).get('peers') or {}):
        raise ConfigError(
            f'{where} has a teacher, but that of {options["config"]} trains '
            'in the same step (trainable=True): no other run stands in for '
            'it. Leave it out, or give a config with a frozen teacher.'
        )
    about = {} if isinstance(teacher, str) else dict(teacher)
    about.pop('name', None)
    config.distillation.teacher = about
