"""What the folder of a training tells of its validations."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def complete_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file; an interruption cuts the last one."""
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def training_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """All that MMEngine logged in a work dir, from old to new.

    Every start of a resumed run has a file of its own. Where two overlap,
    the later counts: it repeats what came after the last checkpoint.
    """
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        yield from complete_rows(path)


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
    """The one that a run is judged by: COCO's AP, else the first."""
    for name in ('coco/bbox_mAP', 'pascal_voc/mAP'):
        if name in metrics:
            return name
    return next(iter(metrics), None)
