"""Pictures of what was found, to look at before anything learns from it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from .charts import figures
from .source import Item, Source

WIDEST = 1280
"""The largest side of a picture, in pixels."""


def write_previews(
    source: Source,
    items: Sequence[Item],
    content: Mapping[str, Any],
    count: int,
    folder: Path,
) -> list[Path]:
    """Draw the boxes on some of the images, evenly from all.

    Args:
        source: Where the images are.
        items: The images.
        content: The result.
        count: How many pictures to draw.
        folder: Where they are written.

    Returns:
        The pictures.
    """
    known = {repr(row['id']) for row in content['images']}
    there = [item for item in items if repr(item.id) in known]
    places = np.linspace(0, len(there) - 1, min(count, len(there)))
    chosen = [there[round(place)] for place in places]
    names = {row['id']: row['name'] for row in content['categories']}
    rows: dict[str, list[Any]] = {}
    for row in content['annotations']:
        rows.setdefault(repr(row['image_id']), []).append(row)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for item, image, _ in source.read(chosen):
        if image is not None:
            drawn = draw(image, rows.get(repr(item.id), []), names)
            path = folder / f'{Path(item.name).as_posix().replace("/", "_")}'
            path = path.with_suffix('.jpg')
            cv2.imwrite(str(path), drawn)
            written.append(path)
    return written


def draw(
    image: np.ndarray, rows: Sequence[Any], names: Mapping[Any, str]
) -> np.ndarray:
    """Return an image with boxes, BGR, the best ones on top.

    Args:
        image: (H, W, 3), uint8, RGB.
        rows: Objects in COCO's form, with scores.
        names: The names of the categories by id.
    """
    scale = min(WIDEST / max(image.shape[:2]), 1.0)
    canvas = cv2.resize(image[..., ::-1], None, fx=scale, fy=scale)
    canvas = np.ascontiguousarray(canvas)
    palette = figures().PALETTE
    for row in sorted(rows, key=lambda each: each['score']):
        left, top, width, height = (round(v * scale) for v in row['bbox'])
        color = _bgr(palette[row['category_id'] % len(palette)])
        corner = left + width, top + height
        cv2.rectangle(canvas, (left, top), corner, color, 2)
        text = f'{names[row["category_id"]]} {row["score"]:.2f}'
        place = left, max(top - 4, 12)
        for shade, thickness in (((255, 255, 255), 3), (color, 1)):
            cv2.putText(
                *(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45),
                *(shade, thickness, cv2.LINE_AA),
            )
    return canvas


def _bgr(color: str) -> tuple[int, int, int]:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return blue, green, red
