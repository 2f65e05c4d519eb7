"""Values as the text of a config."""

import keyword
import pprint
from collections.abc import Mapping
from typing import Any


class Raw(str):
    """An expression, such as ``{{_base_.train_pipeline}}``."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def plain(value: Any) -> Any:
    """Return a config as dicts, lists and tuples.

    The scopes that bases in other packages leave behind go: files are written
    as if for MMDetection, whose scope is the default.
    """
    if hasattr(value, 'to_dict'):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items() if k != '_scope_'}
    if isinstance(value, list | tuple):
        return type(value)(plain(each) for each in value)
    return value


def pretty(value: Any, indent: int = 0) -> str:
    """A literal, a dict with a line for each key."""
    inner = ' ' * (indent + 4)
    if isinstance(value, Mapping) and value:
        names = all(_is_name(key) for key in value)
        parts = [
            f'{f"{k}=" if names else f"{k!r}: "}{pretty(v, indent + 4)}'
            for k, v in value.items()
        ]
        begin, end = ('dict(', ')') if names else ('{', '}')
    elif isinstance(value, list) and any(
        isinstance(each, Mapping) for each in value
    ):
        parts = [pretty(each, indent + 4) for each in value]
        begin, end = '[', ']'
    else:
        text = pprint.pformat(value, sort_dicts=False, width=79 - indent)
        return text.replace('\n', '\n' + ' ' * indent)
    short = f'{begin}{", ".join(parts)}{end}'
    if '\n' not in short and len(short) + indent < 50 and begin == 'dict(':
        return short
    lines = [f'{inner}{part},' for part in parts]
    return '\n'.join([begin, *lines, ' ' * indent + end])


def _is_name(key: object) -> bool:
    word = isinstance(key, str) and key.isidentifier()
    return word and not keyword.iskeyword(key)  # type: ignore[arg-type]
