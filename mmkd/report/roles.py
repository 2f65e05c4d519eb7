"""Who is who among trainings: the plain one, the distilled, the teacher."""

import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmkd.data.files import real_path
from mmkd.errors import MMKDError
from mmkd.teachers.build import descriptions

from .work_dir import WorkDir, short_names

Role = Literal['plain', 'distilled', 'teacher', 'other']
ORDER: tuple[Role, ...] = ('plain', 'distilled', 'teacher', 'other')


@dataclass
class Group:
    """A network: a training, or several that differ in their seeds alone."""

    name: str
    role: Role
    runs: list[WorkDir]

    @property
    def first(self) -> WorkDir:
        """The run that stands for all of them in pictures."""
        return self.runs[0]


def cast(runs: Sequence[WorkDir]) -> list[Group]:
    """Find out who is who, and name the runs accordingly.

    A run with methods of distillation is a distilled one and named after
    them. A run is the teacher if such a run names its checkpoint, and the
    plain student if it has the model of such a run. Without any distilled
    run, all keep the names of their folders.

    Returns:
        The networks, the plain one first. The runs have new names.
    """
    roles = {id(run): role for run, role in zip(runs, find(runs), strict=True)}
    groups: list[tuple[Any, Group]] = []
    for run in sorted(runs, key=lambda run: ORDER.index(roles[id(run)])):
        role, facts = roles[id(run)], facts_of(run)
        for known, group in groups:
            seeds = {other.seed for other in group.runs}
            if known == (role, facts) and run.seed not in seeds:
                group.runs.append(run)
                break
        else:
            group = Group(label(run, role), role, [run])
            groups.append(((role, facts), group))
    networks = [group for _, group in groups]
    name_apart(networks)
    return networks


def find(runs: Sequence[WorkDir]) -> Iterator[Role]:
    """Tell the role of each run."""
    distilled = [run for run in runs if run.methods]
    teachers = [r for r in runs if any(teaches(r, d) for d in distilled)]
    others = [r for r in runs if not r.methods and r not in teachers]
    alike = [
        run for run in others if any(same_model(run, d) for d in distilled)
    ]
    # A student that differs in more than distillation; that is told later.
    plain = alike or (others if len(others) == 1 and distilled else [])
    for run in runs:
        if run.methods:
            yield 'distilled'
        elif run in teachers:
            yield 'teacher'
        elif run in plain:
            yield 'plain'
        else:
            yield 'other'


def teaches(one: WorkDir, other: WorkDir) -> bool:
    """Whether a run is a frozen teacher of another.

    Folders that have been moved are known by their last part.
    """
    return any(
        one.folder == folder
        or (one.folder.name == folder.name and not folder.exists())
        for folder in teacher_folders(other)
    )


def teacher_folders(run: WorkDir) -> Iterator[Path]:
    """The folders of the checkpoints of a run's frozen teachers."""
    with suppress(MMKDError):
        for source in descriptions(run.teacher).values():
            if isinstance(source, Mapping) and source.get('checkpoint'):
                yield real_path(source['checkpoint']).parent


def same_model(one: WorkDir, other: WorkDir) -> bool:
    """Whether two networks have the same layers."""
    a, b = (
        {k: v for k, v in run.config.model.items() if k != 'test_cfg'}
        for run in (one, other)
    )
    return a == b


def facts_of(run: WorkDir) -> dict[str, Any]:
    """What the runs of one network with other seeds have in common."""
    config = copy.deepcopy(run.config.to_dict())
    for key in ('randomness', 'work_dir', 'experiment_name', 'launcher',
                'resume', 'visualizer', 'val_evaluator', 'test_evaluator',
                'default_hooks'):  # fmt: skip
        config.pop(key, None)
    # Each seed may have a teacher of its own.
    if isinstance(config.get('distillation'), dict):
        config['distillation'] = without_seeds(config['distillation'])
    return config


def without_seeds(options: Any) -> Any:
    """Leave out of which seed the networks are that a description names."""
    if isinstance(options, list | tuple):
        return [without_seeds(each) for each in options]
    if not isinstance(options, dict):
        return options
    found = {k: without_seeds(v) for k, v in options.items()}
    found.pop('checkpoint', None)
    if isinstance(config := found.get('config'), str):
        found['config'] = re.sub(r'seed\d+', '', Path(config).name)
    return found


# --------------------------------------------------------------------- names


def label(run: WorkDir, role: Role) -> str:
    if role == 'distilled':
        kinds = [k.removesuffix('Distillation') for k in run.methods.values()]
        return ' + '.join(dict.fromkeys(kinds))
    return run.name if role == 'other' else role


def name_apart(groups: Sequence[Group]) -> None:
    """Name groups and their runs, with their folders where labels meet."""
    counts = Counter(group.name for group in groups)
    same = [group for group in groups if counts[group.name] > 1]
    if same:
        folders = [meaningful(group.first.folder) for group in same]
        try:
            ends = short_names(folders)
        except MMKDError:  # such as x and x/run
            ends = short_names([group.first.folder for group in same])
        for group, end in zip(same, ends, strict=True):
            group.name = f'{group.name} ({end})'
    for group in groups:
        for run in group.runs:
            run.name = group.name
            if len(group.runs) > 1:
                run.name += f', seed {run.seed}'


def meaningful(folder: Path) -> Path:
    """Leave out the last part of a folder if it says nothing."""
    return folder.parent if folder.name == 'run' else folder
