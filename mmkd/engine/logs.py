"""Read what MMEngine has logged in the work dir of a training."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def complete_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file; an interruption cuts the last one."""
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


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
    numbered = (row for row in rows if 'step' in row)
    for row in sorted(numbered, key=lambda row: row['step']):
        for key, value in row.items():
            found.setdefault(key, {})[row['step']] = value
    return found


def validations(folder: Path) -> dict[int, dict[str, float]]:
    """Metrics by epoch (or iteration), in order."""
    found: dict[int, dict[str, float]] = {}
    for row in training_rows(folder):
        metrics = {
            key: value
            for key, value in row.items()
            if '/' in key and not key.startswith('distillation/')
        }
        if metrics and 'loss' not in row and 'step' in row:
            found[row['step']] = metrics
    return dict(sorted(found.items()))


def main_metric(metrics: dict[str, float]) -> str | None:
    """The metric that a run is judged by: COCO's AP, or else the first."""
    for name in ('coco/bbox_mAP', 'pascal_voc/mAP'):
        if name in metrics:
            return name
    return next(iter(metrics), None)
