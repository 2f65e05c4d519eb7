"""What a study pretrains before its runs begin."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.detectors.source import load_config
from mmkd.pretrain.config import network_name

from .file import Options
from .inputs import hash_code, hash_config, hash_file, hash_text, versions
from .run import INPUTS, SOFTWARE
from .step import Step, stop

OPTIONS = {
    **{key: INPUTS[key] for key in ('config', 'code', 'packages')},
    'options': 'its options',
}
"""What a pretraining depends on, in words."""


@dataclass(eq=False)
class Pretraining:
    """A pretraining of one or several networks, on which runs build.

    Attributes:
        configs: Those of the networks; runs begin with the first one's
            backbone.
        options: Further words of ``mmkd pretrain``.
        folder: Holds the notes, and ``run``, the work dir.
        failure: Why it has failed; empty otherwise.
    """

    name: str
    configs: Sequence[str]
    options: Sequence[str]
    folder: Path
    failure: str = ''

    @property
    def file(self) -> Path:
        """The backbone of the first network, once it is there."""
        name = network_name(self.configs[0], {})
        return self.folder / 'run' / f'{name}_backbone.pth'

    @property
    def init_cfg(self) -> dict[str, Any]:
        """What a backbone that begins with it has in its config."""
        return dict(
            type='Pretrained', checkpoint=str(self.file), prefix='backbone.'
        )

    @property
    def file_hash(self) -> str:
        """SHA-256 of the backbone; empty before it is there."""
        return hash_file(self.file) if self.file.is_file() else ''

    @property
    def step(self) -> Step:
        words = [*self.configs, *self.options, '--resume']
        command = ['-m', 'mmkd', 'pretrain', *words, '--work-dir']
        command.append(str(self.folder / 'run'))
        return Step(self.folder, 'pretrain', command, self.inputs)

    @property
    def inputs(self) -> dict[str, str]:
        """Hashes of all that the backbone depends on but the images."""
        configs = [hash_config(load_config(each)) for each in self.configs]
        return {
            'config': hash_text(json.dumps(configs)),
            'options': hash_text(json.dumps([*self.options])),
            'code': hash_code(),
            'packages': hash_text(json.dumps(versions(), sort_keys=True)),
        }

    def status(self, *, keep_stale: bool) -> str:
        """Say ``done``, or else why it is due."""
        noted, now = self.step.state, self.inputs
        then = noted.get('fingerprint', now)
        changed = [key for key in now if then.get(key) != now[key]]
        done = 'finished' in noted and self.file.is_file()
        if done and keep_stale and SOFTWARE.issuperset(changed):
            changed = []
        if changed:
            what = ' and '.join(OPTIONS[key] for key in changed)
            return f'begun anew: {what} changed'
        if done:
            return 'done'
        if 'finished' in noted:
            return 'its backbone is gone, and made again where a run needs it'
        return 'is continued' if noted else 'is to be pretrained'

    def complete(self, lock: int, *, needed: bool, keep_stale: bool) -> None:
        """Pretrain, unless that is done; ``failure`` says if it fails.

        Args:
            lock: That of the study, which the process inherits.
            needed: Whether a run is due that begins with the backbone.
            keep_stale: Keep what was made by other code of mmkd.
        """
        status = self.status(keep_stale=keep_stale)
        anew = status.startswith('begun anew')
        if status == 'done' or not (anew or needed):
            return
        if anew:
            shutil.rmtree(self.folder)
        step = self.step
        print(f'{self.name}: pretraining, see {step.log}', flush=True)
        try:
            step.start(lock)
            while not step.ended():
                time.sleep(0.2)
        finally:
            stop([step] if step.process else [])
        assert step.process
        if step.process.returncode or not self.file.is_file():
            self.failure = (
                f'the pretraining {self.name} failed, see {step.log}'
            )


def read_pretrainings(
    content: Mapping[str, Options], work_dir: Path
) -> dict[str, Pretraining]:
    """Return the pretrainings of a study's file by name."""
    return {
        name: Pretraining(
            name,
            list(about['configs']),
            str(about.get('options', '')).split(),
            work_dir / f'pretrain-{name}',
        )
        for name, about in content.items()
    }
