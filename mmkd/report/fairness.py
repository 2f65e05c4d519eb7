"""Whether two trainings differ in distillation alone."""

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from mmkd.engine.provenance import differences

from .roles import Group
from .work_dir import WorkDir, kind_of

LOADING = (
    'num_workers', 'persistent_workers', 'pin_memory', 'prefetch_factor',
)  # fmt: skip
"""Options of a loader that change nothing but its speed."""


def problems(plain: Group, distilled: Group) -> list[str]:
    """Say why the gain between two networks is not that of distillation."""
    found = [
        each
        for one, other in pairs(plain, distilled)
        for each in unequal(one, other)
    ]
    return list(dict.fromkeys(found))


def remarks(plain: Group, distilled: Group) -> list[str]:
    """Say what else should be known of the two, in whole sentences."""
    found = []
    seeds = [{run.seed for run in each.runs} for each in (plain, distilled)]
    if not seeds[0] & seeds[1] and max(map(len, seeds)) == 1:
        a, b = (next(iter(each)) for each in seeds)
        found.append(
            f'Their seeds differ ({a} and {b}), so that the gain includes '
            'what a seed changes.'
        )
    return found


def unfinished(group: Group) -> Iterator[str]:
    """Yield which runs have not come to the end that was planned."""
    for run in group.runs:
        if run.reached is not None and run.reached < run.planned:
            how = 'Stopped early' if stops_early(run) else 'Unfinished'
            yield (
                f'{how}: {run.name}, {unit(run)} {run.reached} of '
                f'{run.planned}.'
            )


def pairs(plain: Group, distilled: Group) -> Iterator[tuple[WorkDir, WorkDir]]:
    """Pair runs of the same seed; all others go with a first one."""
    ours = {run.seed: run for run in distilled.runs}
    theirs = {run.seed: run for run in plain.runs}
    for seed in dict.fromkeys((*theirs, *ours)):
        yield theirs.get(seed, plain.first), ours.get(seed, distilled.first)


def unequal(plain: WorkDir, distilled: WorkDir) -> Iterator[str]:
    """Yield what else differs between two trainings."""
    yield from lengths(plain, distilled)
    one, other = (portable(r.config.to_dict()) for r in (plain, distilled))
    yield from told(
        'other networks',
        *(without(each['model'], 'test_cfg') for each in (one, other)),
    )
    loaders = [
        without(each['train_dataloader'], *LOADING) for each in (one, other)
    ]
    data = [each.pop('dataset') for each in loaders]
    pipelines = [each.pop('pipeline', None) for each in data]
    batches = [each.pop('batch_size', None) for each in loaders]
    yield from told('other training data', *data)
    yield from told('other augmentation', *pipelines)
    if batches[0] != batches[1]:
        yield f'batches of {batches[0]} against {batches[1]}'
    yield from told('other sampling', *loaders)
    for key, what in (
        ('param_scheduler', 'other schedules'),
        ('optim_wrapper', 'other optimisers'),
        ('load_from', 'other first weights'),
    ):
        yield from told(what, one.get(key), other.get(key))


def lengths(plain: WorkDir, distilled: WorkDir) -> Iterator[str]:
    """Compare how long two networks were and should have been trained."""
    both = (plain, distilled)
    units = [f'{unit(run)}s' for run in both]
    planned = [run.planned for run in both]
    if units[0] != units[1] or planned[0] != planned[1]:
        first = f'{planned[0]} {units[0]}' * (units[0] != units[1])
        yield f'{first or planned[0]} against {planned[1]} {units[1]}'
    elif None not in (reached := [run.reached for run in both]) and (
        reached[0] != reached[1] and not all(map(stops_early, both))
    ):
        yield f'{reached[0]} against {reached[1]} {units[0]}'


def unit(run: WorkDir) -> str:
    return 'epoch' if run.by_epoch else 'iteration'


def stops_early(run: WorkDir) -> bool:
    hooks = run.config.get('custom_hooks') or []
    return any(kind_of(hook) == 'EarlyStoppingHook' for hook in hooks)


# ------------------------------------------------------------------- configs


def without(options: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k not in keys}


def told(what: str, one: Any, other: Any) -> Iterator[str]:
    """Yield the first difference between two parts of configs, if any."""
    found = differences({'': one}, {'': other})
    if found:
        more = f' and {len(found) - 1} more' if len(found) > 1 else ''
        yield f'{what} ({found[0].lstrip(".: ")}{more})'


def portable(value: Any) -> Any:
    """Leave out where data and files lie on a machine."""
    if isinstance(value, Mapping):
        return {
            key: portable(each)
            for key, each in value.items()
            if key not in ('data_root', 'backend_args')
        }
    if isinstance(value, list | tuple):
        return [portable(each) for each in value]
    if isinstance(value, str) and value.startswith('/'):
        return '/'.join(PurePath(value).parts[-2:])
    return value
