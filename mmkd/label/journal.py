"""What has been found so far, on disk, so that a stopped run can go on."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from mmkd.data import read_json, write_json
from mmkd.errors import WorkDirError
from mmkd.teachers.detections import Found

Line = dict[str, Any]
"""An image: its ``id``, and either ``size``, ``boxes``, ``scores`` and
``labels``, or ``fault``, why it has none."""


class Journal:
    """A folder beside the result, with a file of lines for each process.

    Args:
        out: The result.
        about: What decides what is found. A run goes on only with the same.
        anew: Whether to remove what another run has found.

    Raises:
        WorkDirError: If it holds what another run has found.
    """

    def __init__(
        self, out: Path, about: Mapping[str, Any], *, anew: bool = False
    ) -> None:
        self.folder = out.with_name(f'{out.name}.parts')
        if anew:
            self.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / 'about.json'
        if path.is_file():
            theirs = read_json(path)
            others = {
                key: value
                for key, value in about.items()
                if theirs.get(key) != value
            }
            if others:
                key, value = next(iter(others.items()))
                raise WorkDirError(
                    f'{self.folder} holds what another run has found: its '
                    f'{key} is {theirs.get(key)!r}, and now {value!r}. Give '
                    'the same options to go on, --overwrite to begin again, '
                    'or another --out.'
                )
        else:
            write_json(path, dict(about))

    def lines(self) -> Iterator[Line]:
        """Yield what is there; a line that was cut off counts as absent."""
        for path in sorted(self.folder.glob('*.jsonl')):
            for text in path.read_text(encoding='utf-8').splitlines():
                try:
                    yield json.loads(text)
                except ValueError:  # the process was killed in the middle
                    continue

    def open(self, number: int) -> TextIO:
        """Open the file of a process, which goes on where it ends."""
        path = self.folder / f'{number}.jsonl'
        file = path.open('a', encoding='utf-8')
        if path.stat().st_size:
            file.write('\n')  # after what may have been cut off
        return file

    def remove(self) -> None:
        """Remove the folder, once the result is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)


def line_of(number: Any, image: np.ndarray, found: Found | None) -> Line:
    """Return the line of an image in which something was looked for.

    Args:
        number: Its id.
        image: (H, W, 3).
        found: What was found; None if the detector has failed.
    """
    if found is None:
        return dict(id=number, fault='the detector has failed')
    return dict(
        id=number,
        size=list(image.shape[:2]),
        boxes=np.round(found.boxes.astype(float), 2).tolist(),
        scores=np.round(found.scores.astype(float), 4).tolist(),
        labels=found.labels.tolist(),
    )
