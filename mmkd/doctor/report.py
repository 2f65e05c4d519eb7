"""The report of an examination: sections, findings, figures for JSON."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal['stops', 'warns', 'notes']
"""Of a finding: training would fail or teach nothing, it would work worse
than it could, or it is good to know."""


@dataclass
class Report:
    """The result of :func:`mmkd.doctor.diagnose`."""

    sections: dict[str, list[str]] = field(default_factory=dict)
    """The lines of each section, by its title."""
    stops: list[str] = field(default_factory=list)
    """Findings with which training would fail or teach nothing."""
    warns: list[str] = field(default_factory=list)
    """Findings with which training works worse than it could."""
    notes: list[str] = field(default_factory=list)
    """What is good to know, and nothing wrong."""
    folded: dict[str, list[str]] = field(default_factory=dict)
    """What is shown of a section in short."""
    values: dict[str, Any] = field(default_factory=dict)
    """Figures by name, for JSON."""

    def say(self, section: str, *lines: str) -> None:
        """Add lines to a section."""
        self.sections.setdefault(section, []).extend(lines)

    def fold(self, section: str, *lines: str) -> None:
        """Add lines that stand for a section unless all of it is asked for."""
        self.folded.setdefault(section, []).extend(lines)

    @property
    def findings(self) -> list[str]:
        """What is wrong, the worst first; empty for a healthy config."""
        return self.stops + self.warns

    def find(self, finding: str, severity: Severity = 'stops') -> None:
        """Add a finding, once."""
        found: list[str] = getattr(self, severity)
        if finding not in found:
            found.append(finding)

    def text(self, *, verbose: bool = False, width: int = 0) -> str:
        """Return it as text for a terminal, what was found first.

        Args:
            verbose: Whether to show every section whole.
            width: After how many columns lines end; 0: where they end.
        """
        parts = [self.verdict()]
        for title, found in (
            ('Findings', self.stops),
            ('Warnings', self.warns),
            ('Notes', self.notes),
        ):
            lines = [
                wrapped(f'{i:>3}. {each}', width, 5)
                for i, each in enumerate(found, 1)
            ]
            if lines:
                parts.append('\n'.join([title, *lines]))
        for title, lines in self.sections.items():
            if not verbose:
                lines = self.folded.get(title, lines)
            lines = [wrapped(f'  {line}', width, 4) for line in lines]
            parts.append('\n'.join([title, *lines]))
        return '\n\n'.join(parts)

    def verdict(self) -> str:
        """Return in a line how much was found."""
        counts = (
            (len(self.stops), 'finding that stops', 'findings that stop'),
            (len(self.warns), 'warning', 'warnings'),
            (len(self.notes), 'note', 'notes'),
        )
        said = [
            f'{n} {one if n == 1 else more}' for n, one, more in counts if n
        ]
        if not self.findings:
            said.insert(0, 'nothing found')
        return ', '.join(said)


def wrapped(line: str, width: int, indent: int) -> str:
    """Break a line at spaces, and indent what follows."""
    if not width or len(line) <= width:
        return line
    return textwrap.fill(
        line,
        width,
        subsequent_indent=' ' * indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as aligned lines; the first is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        '  '.join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def some(names: Sequence[str], shown: int = 3) -> str:
    """Return the first few names, and how many more there are."""
    more = len(names) - shown
    return ', '.join(names[:shown]) + (f' and {more} more' if more > 0 else '')
