"""A run of a study: its files, its steps, what it depends on."""

import contextlib
import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmkd.data.checkpoint_file import load_checkpoint_file
from mmkd.detectors.source import load_config
from mmkd.errors import CheckpointError, ConfigError
from mmkd.report.work_dir import last_checkpoint

from .hashes import (
    hash_code,
    hash_data,
    hash_file,
    hash_text,
    hash_tools,
    local_file,
)
from .networks import (
    distillation_of,
    hash_network,
    hash_source,
    source_of,
    teachers_of,
)
from .training import fingerprint, read_json, versions, write_json

INPUTS = {
    'config': 'its config',
    'data': 'its data',
    'teacher': "its teacher's checkpoint",
    'peers': 'a config or a first checkpoint of its peers',
    'networks': 'a checkpoint of its run',
    'code': 'the code of mmkd',
    'tools': 'mmkd train or mmkd test',
    'packages': 'the installed packages',
    'libraries': 'ensemble-boxes or scikit-learn',
}
"""What a result depends on, in words."""
SOFTWARE = {'code', 'tools', 'packages', 'libraries'}
"""Inputs in spite of which --keep-stale keeps a result."""
LIBRARIES = ('ensemble-boxes', 'scikit-learn')
"""Packages apart: results of before these were noted stay what they are."""
STUDENT = 'student'
"""The trained model itself, beside its peers."""


@dataclass
class Step:
    """A command at work on a run: its training or its test."""

    folder: Path
    name: str
    command: list[str]
    fingerprint: Mapping[str, str]

    @property
    def log(self) -> Path:
        return self.folder / f'{self.name}.txt'

    @property
    def notes(self) -> Path:
        return self.folder / f'{self.name}.json'

    @property
    def state(self) -> dict[str, Any]:
        """What was noted of it; empty before it was begun."""
        return read_json(self.notes)

    def note(self, **changes: Any) -> None:
        write_json(self.notes, self.state | {**changes})


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
        """The last one, nothing is selected; None if it is gone."""
        try:
            found = last_checkpoint(self.folder)
        except CheckpointError:  # there are some, but none is whole
            return None
        pointer = self.folder / 'last_checkpoint'
        named = pointer.read_text().strip() if pointer.is_file() else ''
        if found and named and Path(found).name != Path(named).name:
            return None  # an earlier one is another network
        return found

    @property
    def is_trained(self) -> bool:
        """Whether only its test is due, if anything."""
        return self.next_step.name == 'test' and not self.changed()

    @property
    def lacking(self) -> str:
        """Why it cannot be run, and what helps; empty if it can."""
        if self.teacher is None or self.teacher.checkpoint or self.is_trained:
            return ''
        return gone(self.teacher)

    def fetch(self) -> None:
        """Download the teachers: their content is part of the inputs.

        Raises:
            CheckpointError: If a checkpoint cannot be had.
        """
        if self.teacher is not None or self.is_trained:
            return
        for about in teachers_of(self.config):
            source = source_of(about)
            if source and local_file(source) is None:
                trust = bool(about.get('trust_checkpoint', False))
                load_checkpoint_file(source, trust=trust)

    @property
    def training(self) -> Step:
        command = ['-m', 'mmkd', 'train', str(self.config_file), '--resume']
        command += ['--work-dir', str(self.folder)]
        return Step(self.folder, 'train', command, self.inputs)

    @property
    def test(self) -> Step:
        command = ['-m', 'mmkd', 'test', str(self.config_file)]
        command += [str(self.checkpoint), '--work-dir']
        return Step(
            self.folder, 'test', [*command, f'{self.folder}/test'], self.inputs
        )

    @property
    def next_step(self) -> Step:
        ended = 'finished' in self.noted and self.checkpoint is not None
        return self.test if ended else self.training

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
            'tools': hash_tools(),
            'packages': hash_text(json.dumps(versions(), sort_keys=True)),
            'libraries': hash_text(json.dumps(libraries(), sort_keys=True)),
        }
        if peers := distillation_of(self.config).get('peers'):
            found['peers'] = hash_text(
                ' '.join(map(hash_network, peers.values()))
            )
        return found

    @property
    def teacher_hash(self) -> str:
        """SHA-256 of the teachers' checkpoints; empty without teacher.

        One that is not there (any more) is the one that was noted, if any.
        """
        if self.teacher is not None:
            return self.teacher.checkpoint_hash
        sources = [source_of(about) for about in teachers_of(self.config)]
        noted = self.noted.get('fingerprint', {}).get('teacher')
        if noted and any(s and local_file(s) is None for s in sources):
            return noted
        return ' '.join(map(hash_source, sources))

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
        if not self.noted:
            if is_empty(self.folder):
                return []
            raise ConfigError(
                f'{self.folder} holds files that are not of a study. Move '
                'them away, or give the study another work_dir.'
            )
        then, now = self.noted.get('fingerprint', {}), self.inputs
        # What an older version did not note is not compared.
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
        command = ['-m', 'mmkd', 'test', str(self.config_file)]
        if len(self.members) == 1:
            command.append(str(self.file_of(self.members[0])))
        command += ['--work-dir', f'{self.folder}/test']
        return Step(self.folder, 'test', command, self.inputs)

    @property
    def next_step(self) -> Step:
        return self.test

    @property
    def lacking(self) -> str:
        files = map(self.file_of, self.members)
        return '' if all(f.is_file() for f in files) else gone(self.source)

    def fetch(self) -> None:
        """A test needs no teacher."""

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


def is_empty(folder: Path) -> bool:
    """Whether there is nothing but notes that were not written to the end."""
    if not folder.exists():
        return True
    return all(p.name.endswith('.json.tmp') for p in folder.iterdir())


def gone(run: Run) -> str:
    return (
        f'a checkpoint of {run.name} is gone or damaged. Bring it back to '
        f'{run.folder}, or remove that folder to train it again.'
    )


def libraries() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
