"""Tables of text, in Markdown and for a terminal."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], form: str = 'pipe'
) -> str:
    """Align the first column to the left and the others to the right.

    Args:
        header: The headings.
        rows: The cells, which are shown as they are.
        form: A ``tablefmt`` of tabulate: ``'pipe'`` is Markdown.

    Example:
        >>> print(table(['class', 'AP'], [['cat', '4.10']], 'plain'))
        class      AP
        cat      4.10
    """
    return tabulate(
        rows,
        header,
        tablefmt=form,
        disable_numparse=True,
        colalign=('left', *['right'] * (len(header) - 1)),
    )
