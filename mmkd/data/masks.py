"""Check masks before pycocotools reads them.

Its C code trusts what it is given: it reads beyond the end of a run-length
encoding that is cut off, and draws polygons point by point, however far away
they reach.
"""

from itertools import pairwise
from typing import Any

import numpy as np

from .files import is_number, shown

LONGEST = 1 << 22
"""Points along the outline of one object; pycocotools visits five times as
many."""


def mask_problem(mask: Any, height: int, width: int) -> str | None:
    """Say what is wrong with a ``segmentation`` of COCO's format.

    Args:
        mask: Polygons, or a run-length encoding (RLE), compressed or not.
        height: Of the image, in pixels.
        width: Of the image, in pixels.

    Returns:
        What is wrong, to follow "got"; None if nothing is.
    """
    if height * width >= 1 << 32:  # pycocotools counts with 32 bits
        return f'a mask in an image of {height} x {width}'
    if isinstance(mask, dict):
        return rle_problem(mask, height, width)
    if not isinstance(mask, list):
        return f'segmentation={shown(mask)}'
    return polygon_problem(mask, height, width)


def rle_problem(rle: dict[str, Any], height: int, width: int) -> str | None:
    """Say what is wrong with a run-length encoding; see above."""
    size, counts = rle.get('size'), rle.get('counts')
    if (
        not isinstance(size, list)
        or any(type(side) is not int for side in size)
        or size != [height, width]
    ):
        there = f'an image of {[height, width]}'
        return f'a mask of size {shown(size)} in {there}'
    if isinstance(counts, list):
        if not all(is_number(n) and type(n) is int and n >= 0 for n in counts):
            return f'a mask with counts={shown(counts)}'
        total, number = sum(counts), len(counts)
    elif isinstance(counts, str):
        runs = decoded(counts)
        if runs is None or (runs < 0).any():
            return f'a mask with counts={shown(counts)}, which is no RLE'
        total, number = int(runs.sum()), len(runs)
    else:
        return f'a mask with counts={shown(counts)}'
    if total != height * width or number > total + 1:
        return (
            f'a mask of {total:,} pixels in {number:,} runs, in an image '
            f'of {height} x {width} = {height * width:,}'
        )
    return None


def decoded(text: str) -> np.ndarray | None:
    """Return the runs of COCO's compressed RLE; None if it is none.

    A run takes characters from 48 to 111, five bits each from the lowest on.
    The sixth bit says that the run goes on, and the fifth of the last
    character is the sign. From the fourth run on, it is the difference to
    the run before the last.
    """
    try:
        codes = np.frombuffer(text.encode('ascii'), np.uint8).astype(np.int64)
    except UnicodeEncodeError:
        return None
    codes -= 48
    if not codes.size:
        return codes
    more = (codes & 0x20) > 0
    if codes.min() < 0 or codes.max() > 63 or more[-1]:
        return None
    ends = np.flatnonzero(~more)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # above 32 bits
        return None
    places = np.arange(codes.size) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 0x1F) << 5 * places, starts)
    runs -= ((codes[ends] & 0x10) > 0).astype(np.int64) << 5 * lengths
    # the first run stands alone; the others follow in two chains
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def polygon_problem(
    polygons: list[Any], height: int, width: int
) -> str | None:
    """Say what is wrong with a list of polygons ``[x0, y0, x1, y1, …]``."""
    outline = 0.0
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) % 2:
            return f'the polygon {shown(polygon)}'
        if len(polygon) < 6:
            return f'a polygon of {len(polygon) // 2} points'
        xs, ys = polygon[::2], polygon[1::2]
        for values, side in ((xs, width), (ys, height)):
            for value in values:
                if not is_number(value) or not -side <= value <= 2 * side:
                    return (
                        f'a polygon with the coordinate {shown(value)} in an '
                        f'image of {height} x {width}'
                    )
        for (x0, x1), (y0, y1) in zip(
            pairwise([*xs, xs[0]]), pairwise([*ys, ys[0]]), strict=True
        ):
            outline += 1 + max(abs(x1 - x0), abs(y1 - y0))
    if outline > LONGEST:
        return f'polygons of {outline:,.0f} pixels around one object'
    return None
