"""The result of labelling as a file in COCO's format."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkd.data import read_json, write_json

from .journal import Line
from .source import Item

KEY = 'labelled_by'
"""What of a result's ``info`` says how it was made."""


@dataclass
class Result:
    """What was found, and what could not be looked at.

    Attributes:
        content: The file in COCO's format; its objects have a ``score``.
        faults: Why an image has no boxes, by its name.
    """

    content: dict[str, Any]
    faults: dict[str, str] = field(default_factory=dict)

    def write(self, out: Path) -> None:
        write_json(out, self.content)


def result_of(
    items: Sequence[Item],
    lines: Iterable[Line],
    classes: Sequence[str],
    about: Mapping[str, Any],
) -> Result:
    """Put together what all processes have found, in the order of the images.

    Args:
        items: The images.
        lines: What was found; of an image that is there twice, the last.
        classes: The names of the classes; ids count from 1.
        about: How it was made.
    """
    found = {_key(line['id']): line for line in lines}
    images: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    faults = {}
    for item in items:
        line = found.get(_key(item.id), dict(fault='it was not looked at'))
        if 'fault' in line:
            faults[item.name] = line['fault']
            continue
        height, width = line['size']
        images.append(
            dict(id=item.id, file_name=item.name, width=width, height=height)
        )
        for box, score, label in zip(
            line['boxes'], line['scores'], line['labels'], strict=True
        ):
            left, top, right, bottom = box
            sides = round(right - left, 2), round(bottom - top, 2)
            if min(sides) > 0:
                rows.append(
                    dict(
                        id=len(rows) + 1,
                        image_id=item.id,
                        category_id=label + 1,
                        bbox=[left, top, *sides],
                        area=round(sides[0] * sides[1], 2),
                        iscrowd=0,
                        score=score,
                    )
                )
    content = dict(
        info={'description': 'labels by `mmkd label`', KEY: dict(about)},
        images=images,
        annotations=rows,
        categories=[dict(id=i, name=n) for i, n in enumerate(classes, 1)],
    )
    return Result(content, faults)


def known_result(out: Path) -> dict[str, Any] | None:
    """Return the content of a result that is complete; None if it is none."""
    if not out.is_file():
        return None
    content = read_json(out)
    info = content.get('info') if isinstance(content, dict) else None
    return content if isinstance(info, dict) and KEY in info else None


def _key(number: Any) -> str:
    return repr(number)
