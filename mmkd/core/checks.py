"""Checks of ``distillation`` in a config; all raise `ConfigError`."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from mmengine.logging import print_log
from torch import nn

from mmkd.errors import ConfigError
from mmkd.registry import METHODS, TEACHERS
from mmkd.teachers.several import log_name
from mmkd.teachers.view import Teacher, listed
from mmkd.utils import ATTACHED, check_options

from .method import Method, Need


def check_keys(cfg: Mapping[str, Any]) -> None:
    """Check that there is something to learn from, and a method."""
    known = ('teacher', 'peers', 'methods', 'unlabelled', 'class_aliases')
    check_options('distillation', cfg, known)
    check_aliases(cfg.get('class_aliases'))
    example = (
        'Example: distillation = dict(teacher=dict(config=..., '
        "checkpoint=...), methods=dict(hint=dict(type='mmkd.FeatureHint')))"
    )
    if cfg.get('teacher') == []:
        raise ConfigError(
            'distillation.teacher is an empty list. Give at least one '
            f'teacher, or leave it out. {example}'
        )
    if not cfg.get('teacher') and not cfg.get('peers'):
        raise ConfigError(
            'distillation needs a "teacher" to learn from, or "peers" to '
            f'train with; got {sorted(cfg)}. {example}'
        )
    if not cfg.get('methods') and not cfg.get('peers'):
        raise ConfigError(
            f'distillation needs "methods", got {sorted(cfg)}. {example}'
        )


def check_aliases(aliases: Any) -> None:
    """Check that ``class_aliases`` maps names to names."""
    if aliases is None:
        return
    whole = isinstance(aliases, Mapping) and all(
        isinstance(name, str) for pair in aliases.items() for name in pair
    )
    if not whole:
        raise ConfigError(
            'distillation.class_aliases must be a dict from names of classes '
            "to other names of the same classes, such as dict(bike='bicycle'),"
            f' got {aliases!r}.'
        )


def check_sources(
    methods: Mapping[str, Method], cfg: Mapping[str, Any]
) -> None:
    """Check that each method has the teacher or peers that it learns from."""
    for name, method in methods.items():
        if not cfg.get(method.learns_from):
            raise ConfigError(
                f'distillation.methods.{name} ({type(method).__name__}) '
                f'needs distillation.{method.learns_from}, which is missing.'
            )


def check_names(
    key: str, parts: Any, taken: Mapping[str, Any] | None = None
) -> None:
    """Check the names of methods or peers.

    They become parts of the names of losses and weights.
    """
    if not isinstance(parts, Mapping):
        raise ConfigError(
            f'distillation.{key} must be a dict from names of your choice to '
            f'configs, got {parts!r}.'
        )
    for name in parts:
        if not str(name).isidentifier() or hasattr(nn.ModuleDict(), name):
            raise ConfigError(
                f'distillation.{key}: "{name}" cannot be a name, because it '
                'becomes part of the names of losses and weights. Choose a '
                'word such as "hint".'
            )
        if key == 'peers':
            check_not_summed([f'{name}.acc'])
        if name in (taken or {}):
            raise ConfigError(
                f'distillation.{key}: "{name}" is also the name of a method. '
                'Choose another one.'
            )


def check_reserved(peers: Mapping[str, Any], cfg: Mapping[str, Any]) -> None:
    """Refuse names with which other losses and metrics begin."""
    frozen = ('teacher',) if cfg.get('teacher') else ()
    for name in (*frozen, 'ensemble', 'idle', ATTACHED):
        if name in peers:
            raise ConfigError(
                f'distillation.peers: "{name}" cannot be a name, because '
                'other losses or metrics begin with it. Choose another one.'
            )


def check_not_summed(names: Iterable[str]) -> None:
    """Refuse numbers that MMDetection would add to the loss by their names."""
    for name in names:
        if 'loss' in name:
            raise ConfigError(
                f'"{name}" is a number to be logged, but every entry with '
                '"loss" in its name is added to the loss. Choose another name '
                f'than "{name.partition(".")[0]}" in the config.'
            )


def check_one_steers(methods: Mapping[str, Method]) -> None:
    """Check that at most one method steers the student's own loss."""
    steering = [name for name, method in methods.items() if method.steers]
    if len(steering) > 1:
        raise ConfigError(
            f'distillation.methods: {", ".join(steering)} each steer the '
            "student's own loss; only one can. Keep one of them."
        )


def check_gives(name: str, method: Method, teacher: Teacher) -> None:
    """Check that each teacher gives what a method reads."""
    where = f'distillation.methods.{name} ({type(method).__name__})'
    teachers = teacher.each()
    if method.steers and any(teachers):
        raise ConfigError(
            f"{where} steers the student's own loss, which only one teacher "
            f'can; distillation.teacher is a list of {len(teachers)}. Give it '
            'a single teacher.'
        )
    for each in teachers.values():
        missing = [n for n in method.needs if not _meets(n, each.gives)]
        if missing:
            raise ConfigError(
                f'{where} needs {_in_words(missing)} from its teacher; '
                f'{type(each).__name__} gives {listed(each.gives)}. '
                f'{_remedy(method, missing, each)}'
            )


def say_left_out(teacher: Teacher) -> None:
    """Name the classes about which a teacher teaches nothing, in the log.

    Those of the student are a warning, because they may only be spelt
    differently.
    """
    for label, each in teacher.each().items():
        name, classes = log_name(label), each.class_map
        if classes.renamed:
            pairs = (f'{a} is its {b}' for a, b in classes.renamed.items())
            print_log(
                f'The {name} has other names of these classes: '
                f'{", ".join(pairs)}',
                'current',
            )
        if classes.unused:
            print_log(
                f'These classes of the {name} are not used: '
                f'{", ".join(classes.unused)}',
                'current',
            )
        if classes.unmatched:
            print_log(
                f'The {name} teaches nothing about {len(classes.unmatched)} '
                f'of {len(classes.student)} classes, because it has none of '
                f'the name: {", ".join(classes.unmatched)}. If it calls one '
                'otherwise, set class_map={"one of these": "its name"} in '
                'distillation.teacher, or class_aliases in distillation for '
                'all teachers; None in class_map leaves a class out without '
                'this warning.',
                'current',
                logging.WARNING,
            )


def say_idle_aliases(aliases: Iterable[str], teacher: Teacher) -> None:
    """Warn of aliases that change nothing: they may be misspelt."""
    maps = [each.class_map for each in teacher.each().values()]
    idle = [name for name in aliases if not any(m.uses(name) for m in maps)]
    if idle:
        print_log(
            f'distillation.class_aliases: {", ".join(idle)} '
            f'{"changes" if len(idle) == 1 else "change"} nothing: no class '
            'of the student meets one of the teacher by this name. Correct '
            'the spelling, or leave it out.',
            'current',
            logging.WARNING,
        )


def _meets(need: Need, gives: Iterable[str]) -> bool:
    alternatives = (need,) if isinstance(need, str) else need
    return any(each in gives for each in alternatives)


def _in_words(needs: Iterable[Need]) -> str:
    return ', '.join(
        need if isinstance(need, str) else ' or '.join(need) for need in needs
    )


def _remedy(method: Method, missing: list[Need], teacher: Teacher) -> str:
    """Say which option, which teachers and which methods help."""
    options = [
        f'Set {method.without[need]} to do without. '
        for need in missing
        if isinstance(need, str) and need in method.without
    ]
    teachers = [
        name
        for name, kind in TEACHERS.module_dict.items()
        if all(_meets(n, getattr(kind, 'gives', ())) for n in method.needs)
    ]
    METHODS.import_from_location()
    methods = {
        kind.__name__: None
        for kind in METHODS.module_dict.values()
        if kind.learns_from == 'teacher'
        and all(_meets(n, teacher.gives) for n in kind.needs)
    }
    return (
        f'{"".join(options)}{teacher.remedy}Teachers that give it: '
        f'{listed(teachers)}. Methods that fit {type(teacher).__name__}: '
        f'{listed(methods)}.'
    )
