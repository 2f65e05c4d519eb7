"""The YAML file of a study, and what is wrong with it."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mmkd.errors import ConfigError
from mmkd.utils import check_options, nearest

Options = Mapping[str, Any]
Rules = dict[str, tuple[Callable[[Any], bool], str]]
"""An option's name to what it must be: a test, and the same in words."""
MERGE = 'tag:yaml.org,2002:merge'

# --------------------------------------------------------------------- rules


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def is_full_mapping(value: Any) -> bool:
    return is_mapping(value) and bool(value)


def is_texts(value: Any) -> bool:
    return is_full_mapping(value) and all(
        isinstance(text, str) for pair in value.items() for text in pair
    )


def is_variants(value: Any) -> bool:
    return is_full_mapping(value) and all(
        is_mapping(options or {}) for options in value.values()
    )


def are_different(kind: type, least: int = 1) -> Callable[[Any], bool]:
    """Return the test for a list of different values of a kind."""
    return lambda values: (
        isinstance(values, list)
        and all(type(value) is kind for value in values)
        and least <= len(values) == len(set(values))
    )


ANYTHING = (lambda value: True, '')
SEEDS = (
    are_different(int),
    'be a list of different whole numbers, such as [0, 1, 2]',
)
VARIANTS = (
    is_variants,
    'map names to options, such as "long: {train_cfg.max_epochs: 24}"',
)
STUDY: Rules = {
    'name': ANYTHING,
    'work_dir': ANYTHING,
    'seeds': SEEDS,
    'baseline': ANYTHING,
    'metrics': (
        is_texts,
        'map a heading to a metric, such as "AP: coco/bbox_mAP"',
    ),
    'data': VARIANTS,
    'runs': (
        is_full_mapping,
        'map a name to its config, such as '
        '"student: {config: mmkd::bccd/student.py}"',
    ),
}
RUN: Rules = {
    'config': ANYTHING,
    'teacher': (
        is_text,
        'be the name of a run; for a row with each of several, write '
        '"teachers: [a, b]"',
    ),
    'options': (
        is_mapping,
        'map keys of the config to values, such as "train_cfg.max_epochs: 24"',
    ),
    'seeds': SEEDS,
    'each': VARIANTS,
    'teachers': (
        are_different(str),
        'be a list of different runs, such as [a, b]',
    ),
    'data': VARIANTS,
}
TESTED: Rules = {
    'of': ANYTHING,
    'network': ANYTHING,
    'ensemble': (
        are_different(str, least=2),
        'be a list of different networks, such as [student, second]',
    ),
}


def is_tested(options: Any) -> bool:
    """Return whether a run is only tested, as it is ``of`` another one."""
    return is_mapping(options) and 'of' in options


def check(
    where: str, given: Options, rules: Rules, separator: str = '.'
) -> None:
    """Raise :class:`ConfigError` for an option that is unknown or wrong."""
    check_options(where, given, rules)
    for key, value in given.items():
        is_right, what = rules[key]
        if not is_right(value):
            raise ConfigError(
                f'{where}{separator}{key} must {what}; got {value!r}.'
            )


def check_name(where: str, name: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r'\w[\w.+-]*', name):
        raise ConfigError(
            f'{where}: the name {name!r} becomes that of a folder; use a text '
            'of letters, digits, "-", "_", "." and "+".'
        )


# ------------------------------------------------------------------ the file


def check_study(content: Any, where: str) -> None:
    """Raise :class:`ConfigError` for what can be seen in the file alone."""
    if not is_mapping(content):
        raise ConfigError(
            f'{where} must hold {", ".join(STUDY)}; see '
            'studies/bccd_frcnn.yaml.'
        )
    check(where, {'runs': None, **content}, STUDY, separator=': ')
    data, runs = content.get('data', {}), content['runs']
    for name in data:
        check_name(f'{where}: data', name)
    for run, options in runs.items():
        here = f'{where}: runs.{run}'
        check_name(here, run)
        if is_tested(options):
            check_tested(here, options, runs)
        else:
            check_trained(here, options, runs, data)


def check_trained(where: str, options: Any, runs: Options, data: Any) -> None:
    if not is_mapping(options) or 'config' not in options:
        raise ConfigError(
            f'{where} must be a mapping with a "config", or with the run '
            f'"of" which it tests a network; got {options!r}.'
        )
    check(where, options, RUN)
    for axis in ('each', 'data'):
        for name in options.get(axis, ()):
            check_name(f'{where}.{axis}', name)
            if axis == 'data' and data and name not in data:
                raise ConfigError(
                    f'{where}.data: the study has no data "{name}". '
                    f'{nearest(name, data)}'
                )
    if 'teacher' in options and 'teachers' in options:
        raise ConfigError(
            f'{where}: the run has a "teacher", too. Leave one of them out.'
        )
    for name in (options.get('teacher'), *options.get('teachers', ())):
        check_source(f'{where}.teacher', name, runs)


def check_tested(where: str, options: Options, runs: Options) -> None:
    own = [key for key in RUN if key in options]
    if own:
        raise ConfigError(
            f'{where} is of another run, whose networks it tests; it cannot '
            f'have {", ".join(own)} of its own. Leave "of" or these out.'
        )
    check(where, options, TESTED)
    check_source(f'{where}.of', options['of'], runs)
    if ('network' in options) == ('ensemble' in options):
        raise ConfigError(
            f'{where} needs either "network", the name of a peer, or '
            f'"ensemble", a list of names; got {dict(options)!r}.'
        )


def check_source(where: str, name: Any, runs: Options) -> None:
    """Raise :class:`ConfigError` if a run that is named is not trained."""
    if is_tested(runs.get(name)):
        raise ConfigError(
            f'{where}: "{name}" is not trained by itself, it is of the run '
            f'"{runs[name]["of"]}". Name a run with a config.'
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
