"""Read what MMEngine has logged in the work dir of a training."""

import contextlib
import functools
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def tell_once_if_full(logger: logging.Logger) -> None:
    """Let a log that cannot be written be told in one line, not in each.

    Python's own way is a stack trace for every line; the run goes on in both.
    """
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            told = functools.partial(_tell_and_close, handler)
            handler.handleError = told  # type: ignore[method-assign]


def _tell_and_close(
    handler: logging.FileHandler, record: logging.LogRecord
) -> None:
    error = sys.exc_info()[1]
    if not isinstance(error, OSError):
        logging.FileHandler.handleError(handler, record)
        return
    handler.setLevel(logging.CRITICAL + 1)
    print(
        f'warning: the log {handler.baseFilename} cannot be written '
        f'({error.strerror}) and ends here. Make room on the disk.',
        file=sys.stderr,
    )


def complete_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file; an interruption cuts the last one.

    What is no row, or no number under a step, is left out: others, and hooks
    of one's own, write into these files as well.
    """
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row


def _is_value(value: object) -> bool:
    return type(value) in (int, float)


def _numbered(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The numbers of the rows of a step."""
    for row in rows:
        if type(row.get('step')) is int:
            yield {k: v for k, v in row.items() if _is_value(v)}


def training_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """All rows that MMEngine logged in a work dir, from old to new.

    Every start of a resumed run has a file of its own. Where two overlap,
    the later one counts: it repeats what came after the last checkpoint.
    """
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        yield from complete_rows(path)


def by_step(rows: Iterable[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Each logged value by iteration (or epoch), under its name in the log."""
    found: dict[str, dict[int, float]] = {}
    for row in sorted(_numbered(rows), key=lambda row: row['step']):
        for key, value in row.items():
            found.setdefault(key, {})[row['step']] = value
    return found


def validations(folder: Path) -> dict[int, dict[str, float]]:
    """Metrics by epoch (or iteration), in order."""
    found: dict[int, dict[str, float]] = {}
    for row in _numbered(training_rows(folder)):
        metrics = {
            key: value
            for key, value in row.items()
            if '/' in key and not key.startswith('distillation/')
        }
        if metrics and 'loss' not in row:
            found[row['step']] = metrics
    return dict(sorted(found.items()))


def main_metric(metrics: dict[str, float]) -> str | None:
    """The metric that a run is judged by: COCO's AP, or else the first."""
    for name in ('coco/bbox_mAP', 'pascal_voc/mAP'):
        if name in metrics:
            return name
    return next(iter(metrics), None)
