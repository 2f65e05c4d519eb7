"""The YAML file of a study, and what is wrong with it."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mmkd.data.files import read_bytes, shown
from mmkd.errors import ConfigError
from mmkd.utils import LAST_SEED, check_options, is_seed, nearest

Options = Mapping[str, Any]
Rules = dict[str, tuple[Callable[[Any], bool], str]]
"""An option's name to what it must be: a test, and the same in words."""
MERGE = 'tag:yaml.org,2002:merge'
LARGEST = 1 << 20
"""Bytes of a file; PyYAML reads a megabyte in about a minute."""
LONGEST = 200
"""Bytes of a name; file systems allow 255, and some is added to it."""
MOST_VALUES = 100_000
"""Values in a file, where an alias counts as all that it stands for."""

# --------------------------------------------------------------------- rules


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_line(value: Any) -> bool:
    """Whether a value is a text without line breaks and the like."""
    return is_text(value) and bool(value.strip()) and value.isprintable()


def is_plain(value: Any) -> bool:
    """Whether a value can be written into a config."""
    if isinstance(value, Mapping):
        return all(map(is_text, value)) and all(map(is_plain, value.values()))
    if isinstance(value, list):
        return all(map(is_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return value is None or isinstance(value, str)


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
        is_options(options or {}) for options in value.values()
    )


def is_options(value: Any) -> bool:
    return is_mapping(value) and is_plain(value)


def are_seeds(value: Any) -> bool:
    return are_different(int)(value) and all(map(is_seed, value))


def are_different(kind: type, least: int = 1) -> Callable[[Any], bool]:
    """Return the test for a list of different values of a kind."""
    return lambda values: (
        isinstance(values, list)
        and all(type(value) is kind for value in values)
        and least <= len(values) == len(set(values))
    )


def is_pretraining(value: Any) -> bool:
    return (
        is_mapping(value)
        and {'configs'} <= {*value} <= {'configs', 'options'}
        and are_different(str)(value['configs'])
        and is_text(value.get('options', ''))
    )


LINE = (is_line, 'be a text of one line')
SEEDS = (
    are_seeds,
    f'be a list of different whole numbers from 0 to {LAST_SEED}, such as '
    '[0, 1, 2]',
)
VARIANTS = (
    is_variants,
    'map names to options, such as "long: {train_cfg.max_epochs: 24}"',
)
STUDY: Rules = {
    'name': LINE,
    'work_dir': LINE,
    'seeds': SEEDS,
    'baseline': (
        lambda value: value is None or is_line(value),
        'be the name of a run',
    ),
    'metrics': (
        is_texts,
        'map a heading to a metric, such as "AP: coco/bbox_mAP"',
    ),
    'data': VARIANTS,
    'pretrain': (
        lambda value: (
            is_full_mapping(value) and all(map(is_pretraining, value.values()))
        ),
        'map names to the configs and options of mmkd pretrain, such as '
        '"simclr: {configs: [student.py], options: --images photos}"',
    ),
    'runs': (
        is_full_mapping,
        'map a name to its config, such as '
        '"student: {config: mmkd::bccd/student.py}"',
    ),
}
RUN: Rules = {
    'config': LINE,
    'teacher': (
        is_text,
        'be the name of a run; for a row with each of several, write '
        '"teachers: [a, b]"',
    ),
    'pretrained': (is_text, 'be the name of a pretraining of the study'),
    'options': (
        is_options,
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
    'of': LINE,
    'network': LINE,
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
                f'{where}{separator}{key} must {what}; got {shown(value)}.'
            )


def check_name(where: str, name: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r'\w[\w.+-]*', name):
        raise ConfigError(
            f'{where}: the name {shown(name)} becomes that of a folder; use a '
            'text of letters, digits, "-", "_", "." and "+".'
        )


def check_folder_name(where: str, name: str) -> None:
    """Refuse a study's name that leads out of the folder of studies."""
    if '/' in name or '\\' in name or name.startswith('.'):
        raise ConfigError(
            f'{where}: name {shown(name)} becomes that of the folder '
            'work_dirs/studies/NAME; use no "/" and no "." at its beginning, '
            'or give a work_dir as well.'
        )
    check_length(where, name)


def check_length(where: str, name: str) -> None:
    if len(name.encode(errors='replace')) > LONGEST:
        raise ConfigError(
            f'{where}: the name {shown(name)} has more than {LONGEST} bytes, '
            'and becomes that of a folder; use a shorter one.'
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
    pretrained = content.get('pretrain', {})
    for name in pretrained:
        check_name(f'{where}: pretrain', name)
    for run, options in runs.items():
        here = f'{where}: runs.{run if is_text(run) else shown(run)}'
        check_name(here, run)
        if is_tested(options):
            check_tested(here, options, runs)
        else:
            check_trained(here, options, runs, data)
            named = options.get('pretrained')
            if named is not None and named not in pretrained:
                raise ConfigError(
                    f'{here}.pretrained: the study has no pretraining '
                    f'"{named}". {nearest(named, pretrained)}'
                )


def check_trained(where: str, options: Any, runs: Options, data: Any) -> None:
    if not is_mapping(options) or 'config' not in options:
        raise ConfigError(
            f'{where} must be a mapping with a "config", or with the run '
            f'"of" which it tests a network; got {shown(options)}.'
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
            f'"ensemble", a list of names; got {shown(dict(options))}.'
        )


def check_source(where: str, name: Any, runs: Options) -> None:
    """Raise :class:`ConfigError` if a run that is named is not trained."""
    if is_tested(runs.get(name)):
        raise ConfigError(
            f'{where}: "{name}" is not trained by itself, it is of the run '
            f'"{runs[name]["of"]}". Name a run with a config.'
        )


MALFORMED = (ValueError, TypeError, AttributeError, LookupError)
"""What PyYAML raises for dates, numbers and the like that cannot be."""


class UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not an override.

    A merge (``<<``) follows YAML's rule: a mapping's own keys come before
    merged ones, and of several merged mappings the first one wins. Releases
    of PyYAML differ in that.

    Aliases of aliases can stand for more than any memory holds, or for
    themselves; both are errors.
    """

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and extent(node, {}) > MOST_VALUES:
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f'it holds more than {MOST_VALUES:,} values, or one that '
                'holds itself, counting all that aliases stand for',
                node.start_mark,
            )
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # no mapping can have it
            if key.value in keys:
                raise yaml.constructor.ConstructorError(
                    *(None, None, f'"{key.value}" is given twice'),
                    node.start_mark,
                )
            keys.add(key.value)
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
    content = read_bytes(path, LARGEST, 'a study', 'Give a study.')
    try:
        return yaml.load(content, UniqueKeys)
    except RecursionError:
        raise ConfigError(
            f'{path} is no study: its values lie too deep in one another.'
        ) from None
    except (yaml.YAMLError, *MALFORMED) as error:
        raise ConfigError(f'{path} is no YAML: {error}') from error


def extent(node: yaml.Node, known: dict[int, float]) -> float:
    """Count the values in a node, as if every alias were written out."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = math.inf  # what holds itself has no end
    total = 1.0
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            total += sum(extent(each, known) for each in pair)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(extent(each, known) for each in node.value)
    known[id(node)] = total
    return total
