"""What ``distillation`` of a config may say; all raise `ConfigError`."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from mmkd.errors import ConfigError
from mmkd.teachers.several import is_list
from mmkd.utils import check_options

from .method import Method


def check_keys(cfg: Mapping[str, Any]) -> None:
    """Its parts: something to learn from, and methods."""
    check_options('distillation', cfg, ('teacher', 'peers', 'methods'))
    example = (
        'Example: distillation = dict(teacher=dict(config=..., '
        "checkpoint=...), methods=dict(hint=dict(type='mmkd.FeatureHint')))"
    )
    if is_list(cfg.get('teacher')) and not cfg['teacher']:
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


def check_needs(methods: Mapping[str, Method], cfg: Mapping[str, Any]) -> None:
    """Each method has the teacher or the peers that it needs."""
    for name, method in methods.items():
        if not cfg.get(method.needs):
            raise ConfigError(
                f'distillation.methods.{name} ({type(method).__name__}) '
                f'needs distillation.{method.needs}, which is missing.'
            )


def check_names(
    key: str, parts: Any, taken: Mapping[str, Any] | None = None
) -> None:
    """Names of methods or peers, which are parts of losses and weights."""
    if not isinstance(parts, Mapping):
        raise ConfigError(
            f'distillation.{key} must be a dict of a name of your choice to '
            f'a config, got {parts!r}.'
        )
    for name in parts:
        if not str(name).isidentifier() or hasattr(nn.ModuleDict(), name):
            raise ConfigError(
                f'distillation.{key}: "{name}" cannot be a name, it is also '
                'one of losses and weights. Choose a word such as "hint".'
            )
        if name in (taken or {}):
            raise ConfigError(
                f'distillation.{key}: "{name}" is the name of a method, too. '
                'Choose another one.'
            )


def check_reserved(peers: Mapping[str, Any], cfg: Mapping[str, Any]) -> None:
    """Refuse names that losses and metrics of others begin with."""
    frozen = ('teacher',) if cfg.get('teacher') else ()
    for name in (*frozen, 'ensemble', 'idle'):
        if name in peers:
            raise ConfigError(
                f'distillation.peers: "{name}" cannot be a name, other '
                'losses or metrics begin with it. Choose another one.'
            )


def check_one_guide(methods: Mapping[str, Method]) -> None:
    """At most one method steers the student's own loss."""
    guides = [
        name
        for name, method in methods.items()
        if type(method).guide is not Method.guide
    ]
    if len(guides) > 1:
        raise ConfigError(
            f'distillation.methods: {", ".join(guides)} each steer the '
            "student's own loss; only one can. Keep one of them."
        )
