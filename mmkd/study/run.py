"""A run of a study: its files, its steps, and what it depends on."""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mmengine.config import Config

from mmkd.data.checkpoint_file import damage, load_checkpoint_file
from mmkd.detectors.source import load_config
from mmkd.engine.checkpoint import latest_checkpoint, pointed_by
from mmkd.errors import CheckpointError, ConfigError

from .inputs import (
    hash_code,
    hash_config,
    hash_data,
    hash_file,
    hash_named_config,
    hash_peers,
    hash_source,
    hash_text,
    local_file,
    source_of,
    teachers_of,
    versions,
)
from .step import Step, read_json

INPUTS = {
    'config': 'its config',
    'data': 'its data',
    'teacher': "its teacher's checkpoint",
    'pretrained': 'its pretrained backbone',
    'peers': 'a config or a first checkpoint of its peers',
    'networks': 'a checkpoint of its run',
    'code': 'the code of mmkd',
    'packages': 'the installed packages',
}
"""What a result depends on, in words."""
SOFTWARE = {'code', 'packages'}
"""The inputs that --keep-stale disregards."""
STUDENT = 'student'
"""The name of the trained model itself among its peers."""


class Begins(Protocol):
    """Something that makes the backbone with which a run begins."""

    name: str
    failure: str

    @property
    def file(self) -> Path: ...
    @property
    def file_hash(self) -> str: ...
    @property
    def init_cfg(self) -> Mapping[str, Any]: ...


@dataclass(eq=False)
class Run:
    """One network of a study, trained and tested with one seed.

    Attributes:
        config: Complete but for the teacher's checkpoint and the work dir.
        teacher: The run whose last checkpoint it distils from.
        pretrained: What its backbone begins with.
        failure: Why the run has failed; empty otherwise.
        step: What runs now, if anything.
    """

    network: str
    seed: int
    work_dir: Path
    config: Config
    teacher: 'Run | None' = None
    pretrained: Begins | None = None
    failure: str = ''
    step: Step | None = None

    @property
    def needed(self) -> 'Run | None':
        """The run that has to be done before this one."""
        return self.teacher

    # --------------------------------------------------------------- its files

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
        """What came out; empty before the end."""
        return read_json(self.folder / 'result.json')

    @property
    def noted(self) -> dict[str, Any]:
        """What was noted of the training; empty before it was begun."""
        return read_json(self.folder / 'train.json')

    @property
    def checkpoint(self) -> str | None:
        """The last checkpoint, without any selection; None if it is gone."""
        with suppress(CheckpointError):  # if none of them is whole
            named = pointed_by(self.folder)
            if named:  # another one in the folder would be another network
                file = str(self.folder / Path(named).name)
                return None if damage(file) else file
            return latest_checkpoint(str(self.folder))
        return None

    def write_config(self) -> None:
        """Write the complete config, for the commands."""
        config = copy.deepcopy(self.config)
        if self.teacher is not None:
            config.distillation.teacher.update(
                config=str(self.teacher.config_file),
                checkpoint=self.teacher.checkpoint,
            )
        if self.pretrained is not None:
            config.model.backbone.init_cfg = dict(self.pretrained.init_cfg)
        self._dump(config)

    def _dump(self, config: Config) -> None:
        self.config_file.parent.mkdir(parents=True, exist_ok=True)
        config.dump(str(self.config_file))

    # --------------------------------------------------------------- its steps

    @property
    def training(self) -> Step:
        return self._step('train', '--resume', '--work-dir', str(self.folder))

    @property
    def test(self) -> Step:
        return self._step('test', str(self.checkpoint), *self._test_options)

    @property
    def next_step(self) -> Step:
        ended = 'finished' in self.noted and self.checkpoint is not None
        return self.test if ended else self.training

    @property
    def _test_options(self) -> list[str]:
        return ['--work-dir', str(self.folder / 'test')]

    def _step(self, name: str, *words: str) -> Step:
        command = ['-m', 'mmkd', name, str(self.config_file), *words]
        return Step(self.folder, name, command, self.inputs)

    @property
    def is_trained(self) -> bool:
        """Whether nothing but its test can be due."""
        return self.next_step.name == 'test' and not self.changed()

    @property
    def lacking(self) -> str:
        """Why it cannot be run, and what helps; empty if it can."""
        begins = self.pretrained
        if begins and not (begins.file.is_file() or self.is_trained):
            return begins.failure or f'{begins.name} is to be pretrained'
        if self.teacher is None or self.teacher.checkpoint or self.is_trained:
            return ''
        return gone(self.teacher)

    def fetch(self) -> None:
        """Download the teachers, whose content is part of the inputs.

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

    # ------------------------------------------------------ what it depends on

    @property
    def inputs(self) -> dict[str, str]:
        """Hashes of all that the result depends on (see :data:`INPUTS`)."""
        config = copy.deepcopy(self.config)
        if self.teacher is not None:
            about = dict(config.distillation.get('teacher') or {})
            about = {**about, 'config': '', 'checkpoint': ''}
            config.distillation.teacher = about
            others = [hash_config(self.teacher.config)]
        else:
            others = [*map(hash_named_config, teachers_of(config))]
        found = {
            'config': hash_config(config, *filter(None, others)),
            'data': hash_data(self.config),
            'teacher': self.teacher_hash,
            'code': hash_code(),
            'packages': hash_text(json.dumps(versions(), sort_keys=True)),
        }
        if peers := hash_peers(self.config):
            found['peers'] = peers
        if self.pretrained is not None:
            found['pretrained'] = self.pretrained_hash
        return found

    @property
    def pretrained_hash(self) -> str:
        """SHA-256 of the backbone; what was noted of it if it is gone."""
        assert self.pretrained
        noted = self.noted.get('fingerprint', {}).get('pretrained', '')
        return self.pretrained.file_hash or noted

    @property
    def teacher_hash(self) -> str:
        """SHA-256 of the teachers' checkpoints; empty without a teacher.

        Where one does not exist (any more), the noted ones count, if any.
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
        """Return the inputs that have changed since the run was begun.

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


@dataclass(eq=False)
class Tested(Run):
    """Networks of a run, a peer or an ensemble, which are only tested.

    They are tested on the data of the run and with its last checkpoints: one
    network as it is, several as an :class:`mmkd.EnsembleDetector`, which
    fuses their boxes.

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
        single = [str(f) for f in self.files if len(self.files) == 1]
        return self._step('test', *single, *self._test_options)

    @property
    def next_step(self) -> Step:
        return self.test

    @property
    def lacking(self) -> str:
        there = all(file.is_file() for file in self.files)
        return '' if there else gone(self.source)

    def fetch(self) -> None:
        """Do nothing: a test needs no teacher."""

    @property
    def noted(self) -> dict[str, Any]:
        """What was noted of the test; empty before it was begun."""
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
        if not all(file.is_file() for file in self.files):
            return self.result.get('checkpoint', '')
        return ' '.join(map(hash_file, self.files))

    @property
    def files(self) -> list[Path]:
        """The members' last checkpoints, whether or not they exist."""
        last = Path(self.source.checkpoint or self.source.folder / 'removed')
        return [
            last if member == STUDENT else last.parent / member / last.name
            for member in self.members
        ]

    def write_config(self) -> None:
        config = copy.deepcopy(self.source.config)
        for key in ('distillation', 'custom_hooks'):
            config.pop(key, None)
        configs = [
            self.source.config_file
            if member == STUDENT
            else self.source.folder / member / 'config.py'
            for member in self.members
        ]
        if len(configs) == 1:
            config.model = load_config(configs[0]).model
        else:
            pairs = zip(configs, self.files, strict=True)
            config.model = {
                'type': 'mmkd.EnsembleDetector',
                'members': [
                    {'config': str(own), 'checkpoint': str(file)}
                    for own, file in pairs
                ],
            }
        self._dump(config)


def is_empty(folder: Path) -> bool:
    """Return whether a folder holds nothing but notes that were broken off."""
    if not folder.exists():
        return True
    return all(re.search(r'\.json\..*tmp$', p.name) for p in folder.iterdir())


def gone(run: Run) -> str:
    return (
        f'a checkpoint of {run.name} is gone or damaged. Bring it back to '
        f'{run.folder}, or remove that folder to train it again.'
    )
