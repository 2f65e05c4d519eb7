"""The report of an examination: sections, findings, figures for JSON."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """The result of :func:`mmkd.doctor.diagnose`."""

    sections: dict[str, list[str]] = field(default_factory=dict)
    """The lines of each section, by its title."""
    findings: list[str] = field(default_factory=list)
    """What is wrong; empty for a healthy config."""
    values: dict[str, Any] = field(default_factory=dict)
    """Figures by name, for JSON."""

    def say(self, section: str, *lines: str) -> None:
        """Add lines to a section."""
        self.sections.setdefault(section, []).extend(lines)

    def find(self, finding: str) -> None:
        """Add a finding, once."""
        if finding not in self.findings:
            self.findings.append(finding)

    def text(self) -> str:
        """Return all of it as text for a terminal."""
        parts = []
        for title, lines in self.sections.items():
            parts.append('\n'.join([title, *(f'  {line}' for line in lines)]))
        numbered = [f'  {i}. {f}' for i, f in enumerate(self.findings, 1)]
        parts.append('\n'.join(['Findings', *numbered]))
        if not self.findings:
            parts[-1] = 'nothing found'
        return '\n\n'.join(parts)


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
