"""Valid files, changed in ways that nobody means."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

TOKENS = (
    *(b'\0', b'\xff', b'\xef\xbb\xbf', b'\r\n', b'"', b'{', b'[', b']', b'}'),
    *(b':', b',', b'-', b'0', b'1e999', b'NaN', b'null', b'true', b'../'),
    *(b'<', b'&', b'<!DOCTYPE x [<!ENTITY a "b">]>', b'&a;', b'%', b'\x80'),
    *(b'9' * 5000, b'[' * 5000, b'PK\3\4', b'<<: *a\n', b'&a ', b'*a '),
    *(b'encoding="utf-7"', b'encoding="none"', b'\xed\xa0\x80',),
)  # fmt: skip

DEEP, LONG = '@deep@', '@long@'
"""What stands for lists in lists and for digits until the file is written:
Python can write neither."""
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 0.5, -0.0, 2**31, 2**53 + 1, 2**64),
    *(10**40, 1e308, -1e308, float('nan'), float('inf'), float('-inf')),
    *('', 'x', '0', '-1', 'NaN', '\0', '../../x', '/etc/passwd', 'C:\\x'),
    *('x' * 1000, '\ud800', 'é\u202e', 'a\nb', '<b>', "'; rm -rf /; '"),
    *([], {}, [[]], [None], [1, 2, 3, 4], [float('nan')] * 4, {'a': {}}),
    *([True] * 4, [-1, -1, -1, -1], [1e200, 0, 1e200, 5], DEEP, LONG),
)  # fmt: skip


EDITS = ('flip', 'cut', 'insert', 'repeat', 'end')


@st.composite
def changed_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """Flip, set, cut, insert and repeat, up to five times."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 5))):
        here = draw(st.integers(0, len(content)))
        there = min(here + draw(st.integers(0, 64)), len(content))
        kind = draw(st.sampled_from(EDITS))
        if kind == 'flip' and here < len(content):
            content[here] ^= 1 << draw(st.integers(0, 7))
        elif kind == 'cut':
            del content[here:there]
        elif kind == 'insert':
            content[here:here] = draw(
                st.sampled_from(TOKENS) | st.binary(min_size=1, max_size=8)
            )
        elif kind == 'repeat':
            content[here:here] = content[here:there] * draw(
                st.integers(1, 100)
            )
        elif kind == 'end':
            del content[here:]
    return bytes(content)


def places(document: Any, above: tuple = ()) -> list[tuple]:
    """The keys that lead to each value in a document."""
    found = [above] if above else []
    if isinstance(document, dict):
        for key, value in document.items():
            found += places(value, (*above, key))
    elif isinstance(document, list):
        for number, value in enumerate(document):
            found += places(value, (*above, number))
    return found


@st.composite
def changed_document(draw: st.DrawFn, valid: Any) -> Any:
    """Put odd values in place of others, leave out, add and repeat."""
    document = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 4))):
        paths = places(document)
        if not paths:
            return document
        *above, last = draw(st.sampled_from(paths))
        inner = document
        for key in above:
            inner = inner[key]
        kind = draw(st.sampled_from(['odd', 'odd', 'odd', 'none', 'twice']))
        odd = copy.deepcopy(draw(st.sampled_from(ODD)))
        if kind == 'odd':
            inner[last] = odd
        elif kind == 'none':
            del inner[last]
        elif isinstance(inner, list):
            inner.append(copy.deepcopy(inner[last]))
        else:
            name = draw(st.sampled_from(['', 'x', 'id', '../x', 'a.b', '\0']))
            inner[name] = odd
    return document


def as_json(document: Any) -> bytes:
    text = json.dumps(document)
    text = text.replace(f'"{DEEP}"', '[' * 5000 + ']' * 5000)
    return text.replace(f'"{LONG}"', '9' * 5000).encode()


def as_text(value: Any) -> str:
    return {DEEP: '[' * 5000, LONG: '9' * 5000}.get(str(value), str(value))
