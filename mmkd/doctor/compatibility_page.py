"""The page of verdicts that :mod:`compatibility` writes."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from mmkd.detectors.shrink import SCALE

from .families import SKIPPED, Pair
from .trial import FAILS, METHODS, UNFIT, WORKS

KINDS = tuple(METHODS)
SHORT = {WORKS: 'works', UNFIT: 'does not fit', FAILS: '**fails**'}
PARTICULARS = (
    (r'^.*; the (student|teacher) is \w+( \(.*?\))?: ', ''),
    (r"the (student|teacher)'s \w+Head\b", 'its head'),
    (r'its \w+Head\b', 'its head'),
    (r'the assignment of the \w+ \(\w+\)', 'its assignment'),
    (r'^\w+ asks which priors .*; ', ''),
    (r'; \w+ has (no bbox_head|\w+Head)', ''),
    (r'^\w+: ', ''),
)
"""Patterns of what in a reason concerns a single pair, and their replacement,
so that equal reasons have the same text."""
INTRODUCTION = """# Compatibility

This page is written by `python tools/compatibility.py`. Everything on it was
run, and the command runs it again. The student of a stock config is trained at
toy scale (narrow layers where the backbone is a ResNet, photos of
{width}x{height} pixels) on the CPU: two plain iterations, then two with each
kind of distillation from an untrained detector of the same config.

| kind | method |
|:--|:--|
{methods}

The verdicts:

* **works**: both iterations ran, every loss was finite, the method's losses
  gave the student a gradient, and the first step differed from that of plain
  training.
* **does not fit**: mmkd refused the pair, with a reason (below).
* **fails**: anything else.

A method that works need not gain anything.
"""


def page(pairs: Sequence[Pair], content: dict[str, Any]) -> str:
    """Return the page in Markdown."""
    trials = content['trials']
    done = [pair for pair in pairs if pair.name in trials]
    same = [pair for pair in done if pair.student == pair.teacher]
    mixed = [pair for pair in done if pair.student != pair.teacher]
    missing = [pair.name for pair in pairs if pair.name not in trials]
    parts = [
        introduction(),
        '## Counts\n\n' + counts(same, trials),
        '## Families\n\n' + table(same, trials),
        '## Teachers of another kind\n\nTeacher to student.\n\n'
        + table(mixed, trials),
        '## Reasons\n\n' + reasons(done, trials),
        '## Left out\n\n' + left_out(),
        '## Versions\n\n' + listed(content['versions'].items()),
    ]
    if missing:
        parts[1] += (
            f'\n\n**Not done: {len(missing)} of {len(pairs)} configs and '
            'pairs have not been tried yet** (below); running the command '
            'again continues with them.'
        )
        parts.append(
            '## Not reached\n\n' + '\n'.join(f'* {n}' for n in missing)
        )
    return '\n\n'.join(part.strip() for part in parts) + '\n'


def introduction() -> str:
    methods = '\n'.join(
        f'| {kind} | `{method["type"]}` |' for kind, method in METHODS.items()
    )
    return INTRODUCTION.format(
        width=SCALE[0], height=SCALE[1], methods=methods
    )


def counts(pairs: Sequence[Pair], trials: dict[str, Any]) -> str:
    """Count families and configs. A family consists of all its configs."""
    runs = [p for p in pairs if status(trials[p.name], 'plain') == WORKS]
    families = {p.student.partition('/')[0] for p in runs}
    failed = {
        p.student.partition('/')[0]
        for p in runs
        if status(trials[p.name], 'features') != WORKS
    }
    share = 100 * (1 - len(failed) / len(families)) if families else 0
    every = {p.student.partition('/')[0] for p in pairs}
    lines = [
        f'**Features are distilled in {len(families) - len(failed)} of '
        f'{len(families)} families ({share:.1f} %)** whose plain step runs '
        f'here; {len(every)} families were tried with {len(pairs)} configs.',
        '',
        '| | works | does not fit | fails |',
        '|:--|--:|--:|--:|',
    ]
    for step in ('plain', *KINDS):
        found = [status(trials[p.name], step) for p in pairs]
        numbers = [found.count(s) for s in (WORKS, UNFIT, FAILS)]
        lines.append(f'| {step} | ' + ' | '.join(map(str, numbers)) + ' |')
    return '\n'.join(lines)


def table(pairs: Sequence[Pair], trials: dict[str, Any]) -> str:
    head = '| | plain | ' + ' | '.join(KINDS) + ' |'
    lines = [head, '|:--|' + ':--|' * (len(KINDS) + 1)]
    for pair in pairs:
        cells = [
            SHORT.get(status(trials[pair.name], step) or '', '–')
            for step in ('plain', *KINDS)
        ]
        lines.append(f'| {pair.name} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def reasons(pairs: Sequence[Pair], trials: dict[str, Any]) -> str:
    """List the failures, the refusals, and plain steps that ran on noise."""
    failed, plain = [], []
    for pair in pairs:
        for step, verdict in trials[pair.name].items():
            if verdict['status'] == FAILS:
                failed.append((f'{pair.name}, {step}', cell(verdict)))
        data = trials[pair.name].get('plain', {}).get('data', 'photos')
        if data != 'photos':
            plain.append((pair.name, data))
    return '\n\n'.join(
        [
            '### Fails\n\n' + (listed(failed) or 'Nothing.'),
            '### Does not fit\n\n"It" is the student or, in a pair, the '
            'teacher.\n\n' + refusals(pairs, trials),
            '### On noise instead of photos\n\n'
            + (listed(plain) or 'Nothing.'),
        ]
    )


def refusals(pairs: Sequence[Pair], trials: dict[str, Any]) -> str:
    """List each reason once, with the detectors that it concerns."""
    concerned: dict[str, dict[str, list[str]]] = {}
    for pair in pairs:
        for step, verdict in trials[pair.name].items():
            if verdict['status'] == UNFIT:
                by_kind = concerned.setdefault(general(cell(verdict)), {})
                by_kind.setdefault(step, []).append(pair.name)
    lines = []
    for reason, by_kind in sorted(concerned.items()):
        kinds: dict[str, list[str]] = {}  # kinds of the same detectors
        for kind, names in by_kind.items():
            kinds.setdefault(families(names, pairs), []).append(kind)
        lines.append(f'* {reason}')
        lines += [f'  * {", ".join(k)}: {who}' for who, k in kinds.items()]
    return '\n'.join(lines)


def general(reason: str) -> str:
    """Return a reason without its particulars."""
    for pattern, instead in PARTICULARS:
        reason = re.sub(pattern, instead, reason)
    return reason


def families(names: Sequence[str], pairs: Sequence[Pair]) -> str:
    """Name configs, or their folder if all that is tried in it is meant."""
    shown = []
    for name in names:
        folder = name.partition('/')[0]
        all_of_it = [p.name for p in pairs if p.name.startswith(f'{folder}/')]
        shown.append(folder if set(all_of_it) <= set(names) else name)
    return ', '.join(dict.fromkeys(shown))


def cell(verdict: dict[str, Any]) -> str:
    return verdict['reason'].replace('|', '\\|')


def left_out() -> str:
    return listed(
        (f'{why[0].upper()}{why[1:]}', ', '.join(folders.split()))
        for why, folders in SKIPPED.items()
    )


def listed(items: Iterable[tuple[str, str]]) -> str:
    return '\n'.join(f'* {name}: {text}' for name, text in items)


def status(steps: dict[str, Any], step: str) -> str | None:
    return steps.get(step, {}).get('status')
