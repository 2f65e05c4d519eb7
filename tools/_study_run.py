"""A run of `tools/study.py`: its files, its steps, what it depends on."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _hashes import hash_code, hash_data, hash_file, hash_text, is_file
from _training import fingerprint, read_json, versions, write_json
from _work_dir import last_checkpoint
from mmengine.config import Config

from mmkd.several_teachers import described
from mmkd.teacher_source import load_config
from mmkd.utils import ConfigError

INPUTS = {
    'config': 'its config',
    'data': 'its data',
    'teacher': "its teacher's checkpoint",
    'peers': 'a config or a first checkpoint of its peers',
    'networks': 'a checkpoint of its run',
    'code': 'the code of mmkd',
    'packages': 'the installed packages',
}
"""What a result depends on, in words."""
SOFTWARE = {'code', 'packages'}
"""Inputs in spite of which --keep-stale keeps a result."""
STUDENT = 'student'
"""The trained model itself, beside its peers."""


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
    def needed(self) -> 'Run | None':
        """The run that has to be done before."""
        return self.teacher

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
    def next_step(self) -> Step:
        return self.test if 'finished' in self.noted else self.training

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
        found = {
            'config': fingerprint(config, *others),
            'data': hash_data(self.config),
            'teacher': self.teacher_hash,
            'code': hash_code(),
            'packages': hash_text(json.dumps(versions(), sort_keys=True)),
        }
        if peers := self.config.get('distillation', {}).get('peers'):
            found['peers'] = hash_text(
                ' '.join(map(hash_network, peers.values()))
            )
        return found

    @property
    def teacher_hash(self) -> str:
        """SHA-256 of the teacher's checkpoint; empty without teacher."""
        if self.teacher is not None:
            return self.teacher.checkpoint_hash
        return ' '.join(map(hash_checkpoint, teachers_of(self.config)))

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
        then, now = self.noted.get('fingerprint', {}), self.inputs
        # What an older version of this tool did not note is not compared.
        return [key for key in now if then.get(key, now[key]) != now[key]]

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
class Tested(Run):
    """Networks of a run, its peer or an ensemble, which are tested only.

    On the data of the run and with its last checkpoints. One network is
    tested as it is, several as an :class:`mmkd.EnsembleDetector`, which fuses
    their boxes.

    Attributes:
        source: The run that trains them.
        members: The names of the networks.
    """

    source: Run = field(kw_only=True)
    members: Sequence[str] = field(kw_only=True)

    @property
    def needed(self) -> Run:
        return self.source

    @property
    def test(self) -> Step:
        command = ['tools/test.py', str(self.config_file)]
        if len(self.members) == 1:
            command.append(str(self.file_of(self.members[0])))
        command += ['--work-dir', f'{self.folder}/test']
        return Step(self.folder, 'test', command, self.inputs)

    @property
    def next_step(self) -> Step:
        return self.test

    @property
    def noted(self) -> dict[str, Any]:
        return read_json(self.folder / 'test.json')

    @property
    def inputs(self) -> dict[str, str]:
        theirs = self.source.inputs
        described = json.dumps([theirs['config'], *self.members])
        return {
            **theirs,
            'config': hash_text(described),
            'networks': self.checkpoint_hash,
        }

    @property
    def checkpoint_hash(self) -> str:
        files = [self.file_of(member) for member in self.members]
        if not all(file.is_file() for file in files):
            return self.result.get('checkpoint', '')
        return ' '.join(hash_file(file) for file in files)

    def file_of(self, member: str) -> Path:
        """The last checkpoint of a network, whether or not it is there."""
        last = Path(self.source.checkpoint or self.source.folder / 'removed')
        return last if member == STUDENT else last.parent / member / last.name

    def write_config(self) -> None:
        config = copy.deepcopy(self.source.config)
        for key in ('distillation', 'custom_hooks'):
            config.pop(key, None)
        members = [
            {
                'config': str(
                    self.source.config_file
                    if member == STUDENT
                    else self.source.folder / member / 'config.py'
                ),
                'checkpoint': str(self.file_of(member)),
            }
            for member in self.members
        ]
        if len(members) == 1:
            config.model = load_config(members[0]['config']).model
        else:
            config.model = {
                'type': 'mmkd.EnsembleDetector',
                'members': members,
            }
        self.config_file.parent.mkdir(parents=True, exist_ok=True)
        config.dump(str(self.config_file))


def teachers_of(config: Config) -> list[dict[str, Any]]:
    """The descriptions of a config's teachers."""
    teacher = config.get('distillation', {}).get('teacher')
    networks = described(teacher).values() if teacher else ()
    return [{'name': n} if isinstance(n, str) else dict(n) for n in networks]


def hash_network(about: Mapping[str, Any]) -> str:
    """Of the config, if it is a file, and the checkpoint of a description."""
    theirs = ''
    if isinstance(about.get('config'), str):
        theirs = fingerprint(load_config(about['config']))
    return f'{theirs} {hash_checkpoint(about)}'


def hash_checkpoint(about: Mapping[str, Any]) -> str:
    """SHA-256 of a file; a URL names itself."""
    source = str(about.get('checkpoint') or '')
    return hash_file(Path(source)) if is_file(source) else source
