"""Faults of data: gathered by kind, and told with a few places each."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .report import Report, Severity

SHOWN = 3
PLURALS = {'y': 'ies', 'x': 'xes', 's': 'ses'}


def counted(count: int, noun: str) -> str:
    """Return a number with its noun.

    Example:
        >>> from mmkd.doctor.faults import counted
        >>> counted(1, 'box'), counted(1200, 'entry')
        ('1 box', '1,200 entries')
    """
    if count == 1:
        return f'1 {noun}'
    ending = PLURALS.get(noun[-1], f'{noun[-1]}s')
    return f'{count:,} {noun[:-1]}{ending}'


@dataclass
class _Kind:
    count: int = 0
    places: list[str] = field(default_factory=list)


class Faults:
    """What is wrong with data, each kind once with its count and places."""

    def __init__(self) -> None:
        self.kinds: dict[tuple[str, Severity, str, str, str], _Kind] = {}
        self.told: list[tuple[str, Severity]] = []

    @staticmethod
    def share(count: int, total: int) -> Severity:
        """Judge a loss: of the larger part, nothing can be learnt."""
        return 'stops' if 2 * count > total else 'warns'

    def add(
        self,
        split: str,
        severity: Severity,
        noun: str,
        what: str,
        count: int,
        places: Sequence[str],
        remedy: str = '',
    ) -> None:
        """Add faults of one kind; a count of 0 adds none.

        Args:
            split: The split of the data, such as ``train``.
            severity: What comes of it.
            noun: What is counted, in the singular.
            what: What is wrong, which follows the noun.
            count: How many there are.
            places: Where the first few of them are.
            remedy: What to do, or why this matters, as a sentence.
        """
        if not count:
            return
        kind = self.kinds.setdefault(
            (split, severity, noun, what, remedy), _Kind()
        )
        kind.count += count
        kind.places.extend(places[:SHOWN])

    def say(self, text: str, severity: Severity) -> None:
        """Add a fault that is told in words of its own."""
        self.told.append((text, severity))

    def worst(self, split: str) -> bool:
        """Whether something of a split stops training."""
        prefix = f'{split}: '
        return any(
            key[0] == split and key[1] == 'stops' for key in self.kinds
        ) or any(
            text.startswith(prefix) and severity == 'stops'
            for text, severity in self.told
        )

    def report(self, report: Report) -> None:
        """Make a finding of every kind."""
        for text, severity in self.told:
            report.find(text, severity)
        for key, kind in self.kinds.items():
            split, severity, noun, what, remedy = key
            text = f'{split}: {counted(kind.count, noun)} {what}'
            if kind.places:
                shown = kind.places[:SHOWN]
                more = kind.count - len(shown)
                text += f': {"; ".join(shown)}'
                text += f'; and {more:,} more' if more > 0 else ''
            report.find(f'{text}. {remedy}'.rstrip(), severity)
