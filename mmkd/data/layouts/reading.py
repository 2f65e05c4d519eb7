"""What the readers of all layouts fill: images with their objects."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import is_number
from ..pictures import headers_alone, orientation_of
from .data import Data, Faults

UNREADABLE = 'images that cannot be opened'
Box = tuple[float, float, float, float]
"""``(x, y, width, height)`` in pixels, as COCO has it."""


@dataclass(slots=True)
class Item:
    """An object: its class, and what COCO says of it."""

    name: str
    box: Box
    crowd: bool = False
    area: float | None = None
    outline: Any = None


@dataclass(slots=True)
class Picture:
    """An image.

    Attributes:
        path: The file.
        split: One of the splits, or '' where the layout has none.
        width: In pixels, as a training sees it.
        height: The same.
        turn: The EXIF orientation by which boxes are yet to be turned, because
            they were drawn on the image as it is stored; else 0.
    """

    path: Path
    split: str
    width: int
    height: int
    turn: int = 0
    items: list[Item] = field(default_factory=list)

    def add(self, name: str, box: Box, **more: Any) -> None:
        """Add an object with a box on the image as it was labelled."""
        item = Item(name, box, **more)
        if self.turn:
            item.box = self._turned(box)
            if isinstance(item.outline, list):
                item.outline = [
                    [
                        value
                        for point in _points(polygon)
                        for value in self._point(*point)
                    ]
                    for polygon in item.outline
                ]
            else:
                item.outline = None  # run lengths
        self.items.append(item)

    def _turned(self, box: Box) -> Box:
        x, y, width, height = box
        first = self._point(x, y)
        last = self._point(x + width, y + height)
        left, top = min(first[0], last[0]), min(first[1], last[1])
        return left, top, abs(height), abs(width)

    def _point(self, x: float, y: float) -> tuple[float, float]:
        """Move a point by the orientation; width and height are the result's.

        Orientations 5 to 8 swap the axes; 6 and 7 then mirror x, 7 and 8 y.
        """
        left, top = y, x
        if self.turn in (6, 7):
            left = self.width - left
        if self.turn in (7, 8):
            top = self.height - top
        return left, top


def _points(polygon: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(polygon[::2], polygon[1::2], strict=False))


class Reading:
    """What was read of a folder, with what was left out.

    Attributes:
        layout: The name of the layout.
        root: The folder that the names of images begin in.
        classes: The names of the classes in their order.
        numbered: Whether the data number the classes and do not name them.
        pictures: The images by file.
        notes: What is to be said, for each line of the summary.
    """

    def __init__(self, layout: str, root: Path) -> None:
        self.layout = layout
        self.root = root
        self.classes: list[str] = []
        self.groups: list[str] = []
        self.numbered = False
        self.pictures: dict[tuple[str, str], Picture] = {}
        self.faults = Faults()
        self.notes: dict[str, list[str]] = {}

    def note(self, line: str, text: str) -> None:
        self.notes.setdefault(line, []).append(text)

    def picture(
        self, path: Path, split: str, size: Sequence[Any] = ()
    ) -> Picture | None:
        """Open the header of an image, and take it in.

        Args:
            path: The file.
            split: Where it belongs.
            size: Width and height that the annotations give it, if any. They
                are kept if they are not those of the file.

        Returns:
            The image, the same one if it is there already; None, and a fault,
            if it cannot be opened.
        """
        key = str(path), split
        if key in self.pictures:
            return self.pictures[key]
        try:
            stored, orientation = header(path)
        except Exception as error:  # whatever a damaged header brings about
            why = 'an empty file' if _is_empty(path) else _shortly(error)
            self.faults.image(UNREADABLE, f'{self.short(path)}: {why}')
            return None
        seen = stored[::-1] if orientation > 4 else stored
        picture = Picture(path, split, *seen)
        given = [v for v in size if is_number(v) and v >= 1]
        if len(given) == 2 and tuple(given) != seen:
            if tuple(given) == stored:
                picture.turn = orientation
            else:
                picture.width, picture.height = (int(v) for v in given)
        self.pictures[key] = picture
        return picture

    def short(self, path: Path) -> str:
        """A path as messages have it."""
        root = self.root
        return str(
            path.relative_to(root) if path.is_relative_to(root) else path
        )


def header(path: Path) -> tuple[tuple[int, int], int]:
    """Read the stored width and height, and the orientation that is applied.

    Returns:
        The size, and the EXIF orientation by which OpenCV turns the image, 1
        for none.
    """
    from PIL import Image

    with headers_alone(), Image.open(path) as image:
        return image.size, orientation_of(image)


def _is_empty(path: Path) -> bool:
    try:
        return not path.stat().st_size
    except OSError:
        return False


def _shortly(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if 'cannot identify' in str(error):
        return 'no image, or of a kind that is not known'
    return str(error)[:80] or type(error).__name__


class Source:
    """A layout that was found in a folder, ``root``."""

    root: Path
    beside: Sequence[Path] = ()
    """Folders of other data, which are not read."""

    def files_read(self) -> tuple[object, ...]:
        """The files that describe the data, by which two can be compared."""
        return ()

    def as_it_stands(self) -> Data | None:
        """The data, if MMDetection reads them without a conversion."""
        return None

    def read(self) -> Reading:
        raise NotImplementedError
