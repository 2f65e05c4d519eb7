"""The runs of `tools/study.py`: what they are, depend on, and lack."""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from _hashes import hash_code, hash_data, hash_file, hash_text, is_file
from _training import fingerprint, read_json, versions, write_json
from _work_dir import last_checkpoint
from mmengine.config import Config

from mmkd.several_teachers import described, is_list, is_mean
from mmkd.teacher_source import load_config
from mmkd.utils import ConfigError, check_options, nearest

METRICS = {
    'AP': 'coco/bbox_mAP',
    'AP50': 'coco/bbox_mAP_50',
    'AP75': 'coco/bbox_mAP_75',
}
STUDY_OPTIONS = ('name', 'work_dir', 'seeds', 'baseline', 'metrics', 'runs')
RUN_OPTIONS = ('config', 'teacher', 'options', 'seeds')
INPUTS = {
    'config': 'its config',
    'data': 'its data',
    'teacher': "its teacher's checkpoint",
    'code': 'the code of mmkd',
    'packages': 'the installed packages',
}
"""What a result depends on, in words."""
SOFTWARE = {'code', 'packages'}
"""Inputs in spite of which --keep-stale keeps a result."""


@dataclass
class Step:
    """A tool at work on a run: its training or its test."""

    folder: Path
    name: str
    command: list[str]
    fingerprint: Mapping[str, str]

    @property
    def log(self) -> Path:
        return self.folder / f'{self.name}.txt'

    @property
    def state(self) -> dict[str, Any]:
        """What was noted of it; empty before it was begun."""
        return read_json(self.folder / f'{self.name}.json')

    def note(self, **changes: Any) -> None:
        write_json(self.folder / f'{self.name}.json', self.state | {**changes})


@dataclass
class Run:
    """One network of a study, trained with one seed.

    Attributes:
        config: Complete, but for the teacher's checkpoint and the work dir.
        teacher: The run whose last checkpoint it distils from.
    """

    network: str
    seed: int
    work_dir: Path
    config: Config
    teacher: 'Run | None' = None
    failure: str = ''

    @property
    def name(self) -> str:
        return f'{self.network}-seed{self.seed}'

    @property
    def folder(self) -> Path:
        return self.work_dir / self.name

    @property
    def config_file(self) -> Path:
        return self.work_dir / 'configs' / f'{self.name}.py'

    @property
    def result(self) -> dict[str, Any]:
        """What came out; empty before its end."""
        return read_json(self.folder / 'result.json')

    @property
    def checkpoint(self) -> str | None:
        """The last one; nothing is selected."""
        return last_checkpoint(self.folder)

    @property
    def training(self) -> Step:
        command = ['tools/train.py', str(self.config_file), '--resume']
        command += ['--work-dir', str(self.folder)]
        return Step(self.folder, 'train', command, self.inputs)

    @property
    def test(self) -> Step:
        command = ['tools/test.py', str(self.config_file)]
        command += [str(self.checkpoint), '--work-dir']
        return Step(
            self.folder, 'test', [*command, f'{self.folder}/test'], self.inputs
        )

    @property
    def noted(self) -> dict[str, Any]:
        """What was noted of its training; empty before that was begun."""
        return read_json(self.folder / 'train.json')

    @property
    def inputs(self) -> dict[str, str]:
        """Hashes of all that the result depends on (see :data:`INPUTS`)."""
        config = copy.deepcopy(self.config)
        others = []
        if self.teacher is not None:
            others.append(fingerprint(self.teacher.config).encode())
            about = dict(config.distillation.get('teacher') or {})
            about = {**about, 'config': '', 'checkpoint': ''}
            config.distillation.teacher = about
        else:
            for about in teachers_of(config):
                if isinstance(about.get('config'), str):
                    theirs = load_config(about['config'])
                    others.append(fingerprint(theirs).encode())
        return {
            'config': fingerprint(config, *others),
            'data': hash_data(self.config),
            'teacher': self.teacher_hash,
            'code': hash_code(),
            'packages': hash_text(json.dumps(versions(), sort_keys=True)),
        }

    @property
    def teacher_hash(self) -> str:
        """SHA-256 of the teacher's checkpoint; empty without teacher."""
        if self.teacher is not None:
            return self.teacher.checkpoint_hash
        sources = [
            str(options.get('checkpoint') or '')
            for options in teachers_of(self.config)
        ]
        return ' '.join(
            hash_file(Path(source)) if is_file(source) else source
            for source in sources
        )

    @property
    def checkpoint_hash(self) -> str:
        """SHA-256 of the last checkpoint, or of what was tested before."""
        last = self.checkpoint
        if last is None:  # removed, perhaps to save space
            return self.result.get('checkpoint', '')
        return hash_file(Path(last))

    def changed(self) -> list[str]:
        """The inputs that are others than when the run was begun.

        Raises:
            ConfigError: If the folder is not a study's.
        """
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return []
        if not self.noted:
            raise ConfigError(
                f'{self.folder} holds files that are not of a study. Move '
                'them away, or give the study another work_dir.'
            )
        then, now = self.noted['fingerprint'], self.inputs
        return [key for key in INPUTS if then.get(key) != now[key]]

    def write_config(self) -> None:
        """Write the complete config, for the tools."""
        config = copy.deepcopy(self.config)
        if self.teacher is not None:
            config.distillation.teacher.update(
                config=str(self.teacher.config_file),
                checkpoint=self.teacher.checkpoint,
            )
        self.config_file.parent.mkdir(parents=True, exist_ok=True)
        config.dump(str(self.config_file))


@dataclass
class Study:
    """A grid of networks and seeds."""

    name: str
    work_dir: Path
    seeds: list[int]
    baseline: str | None
    metrics: dict[str, str]
    runs: list[Run] = field(default_factory=list)
    """By network, then seed; teachers come before their students."""

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
            f'"student: {{config: configs/bccd/student.py}}"; got '
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
    if study.baseline is not None:
        check_network(study.baseline, networks, f'{where}: baseline')
    for network, options in networks.items():
        check_run(f'{where}: runs.{network}', network, options, networks)
    made: dict[tuple[str, int], Run] = {}
    for network in in_order(networks, where):
        options = networks[network]
        config = resolve(options, f'{where}: runs.{network}')
        seeds = options.get('seeds', study.seeds)
        for seed in read_seeds(seeds, f'{where}: runs.{network}'):
            own = copy.deepcopy(config)
            own.merge_from_dict({'randomness.seed': seed})
            teacher = None
            if 'teacher' in options:
                teacher = teacher_run(made, options['teacher'], seed, where)
            made[network, seed] = Run(
                network, seed, study.work_dir, own, teacher
            )
    study.runs = list(made.values())
    return study


def teacher_run(
    made: Mapping[tuple[str, int], Run], name: str, seed: int, where: str
) -> Run:
    """The teacher of the same seed, or the only one."""
    runs = {run.seed: run for run in made.values() if run.network == name}
    if seed in runs:
        return runs[seed]
    if len(runs) == 1:
        return next(iter(runs.values()))
    raise ConfigError(
        f'{where}: the run "{name}" is a teacher for seed {seed}, but has '
        f'the seeds {sorted(runs)}. Give it that seed, or one seed alone, '
        'which then teaches all.'
    )


class UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not an override."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f'"{key}" is given twice', node.start_mark
                )
        return super().construct_mapping(node, deep)


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


def check_network(name: str, networks: Mapping[str, Any], where: str) -> None:
    if name not in networks:
        raise ConfigError(
            f'{where} names the run "{name}", which does not exist. '
            f'{nearest(name, networks)}'
        )


def check_run(
    where: str, name: str, options: Any, networks: Mapping[str, Any]
) -> None:
    if not re.fullmatch(r'\w[\w.+-]*', name):
        raise ConfigError(
            f'{where}: the name becomes that of a folder; use letters, '
            'digits, "-", "_", "." and "+".'
        )
    if not isinstance(options, Mapping) or 'config' not in options:
        raise ConfigError(
            f'{where} must be a mapping with a "config", got {options!r}.'
        )
    check_options(where, options, RUN_OPTIONS)
    if 'teacher' in options:
        check_network(options['teacher'], networks, f'{where}.teacher')
    if not isinstance(options.get('options', {}), Mapping):
        raise ConfigError(
            f'{where}.options must map keys of the config to values, such as '
            f'"train_cfg.max_epochs: 24"; got {options["options"]!r}.'
        )


def in_order(networks: Mapping[str, Any], where: str) -> Iterator[str]:
    """The networks as given, but teachers before their students."""
    waiting, done = list(networks), {None}
    while waiting:
        ready = [n for n in waiting if networks[n].get('teacher') in done]
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
        config,
    )
    config.merge_from_dict(changes)
    config.pop('work_dir', None)
    if 'teacher' in options:
        if 'distillation' not in config:
            raise ConfigError(
                f'{where} has a teacher, but {options["config"]} has no '
                '`distillation` to use it.'
            )
        teacher = config.distillation.setdefault('teacher', {})
        if is_list(teacher) or is_mean(teacher):
            raise ConfigError(
                f'{where} has a teacher, but {options["config"]} describes '
                'several teachers. Leave it out, or give a config of one.'
            )
        teacher.pop('name', None)
    return config


def teachers_of(config: Config) -> list[dict[str, Any]]:
    """The descriptions of a config's teachers."""
    teacher = config.get('distillation', {}).get('teacher')
    networks = described(teacher).values() if teacher else ()
    return [{'name': n} if isinstance(n, str) else dict(n) for n in networks]
