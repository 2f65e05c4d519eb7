"""A table of boxes: a CSV file in which each row is a box."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mmkd.errors import DataError

from ..errors import data_error, some
from ..files import is_number, read_bytes, shown
from .data import SPLITS
from .listing import (
    ALIASES,
    Lookup,
    files_in,
    images_below,
    is_image,
    split_of,
    with_validation,
)
from .reading import Picture, Reading, Source

LARGEST = 1 << 31
REMEDY = 'Correct the file, or export it again.'
IMAGE = ('filename', 'file_name', 'image', 'image_name', 'image_id', 'imageid',
         'img', 'img_path', 'image_path', 'path', 'filepath', 'file_path',
         'file', 'name_of_image', 'img_name', 'frame')  # fmt: skip
CLASS = ('class', 'label', 'labelname', 'label_name', 'class_name',
         'classname', 'category', 'category_name', 'name', 'object', 'species',
         'class_id', 'label_id')  # fmt: skip
CORNERS = (
    ('xmin', 'ymin', 'xmax', 'ymax'),
    ('x_min', 'y_min', 'x_max', 'y_max'),
    ('x1', 'y1', 'x2', 'y2'),
    ('x0', 'y0', 'x1', 'y1'),
    ('left', 'top', 'right', 'bottom'),
    ('bbox_xmin', 'bbox_ymin', 'bbox_xmax', 'bbox_ymax'),
    ('bbox_x1', 'bbox_y1', 'bbox_x2', 'bbox_y2'),
)
SIDES = (
    ('x', 'y', 'w', 'h'),
    ('x', 'y', 'width', 'height'),
    ('xmin', 'ymin', 'w', 'h'),
    ('xmin', 'ymin', 'width', 'height'),
    ('left', 'top', 'width', 'height'),
    ('bbox_x', 'bbox_y', 'bbox_width', 'bbox_height'),
    ('bbox_x', 'bbox_y', 'bbox_w', 'bbox_h'),
)
BOX = ('bbox', 'box')
"""One column with ``[x, y, width, height]``."""
SCORE = ('score', 'confidence', 'conf', 'probability', 'prob')
SPLIT = ('split', 'set', 'subset')
HEADERLESS = ('path', 'x1', 'y1', 'x2', 'y2', 'class')
"""Columns of RetinaNet's and other files without a header."""
ROWS = 'rows that cannot be read'
LOST = 'rows of an image that is not there'
BARE = 'images without a row'


@dataclass
class Columns:
    """Where in a row is what."""

    image: int
    box: list[int]
    corners: bool
    name: int | None
    split: int | None = None
    crowd: int | None = None
    size: tuple[int, int] | None = None
    header: bool = True
    score: int | None = None


@dataclass(slots=True)
class Row:
    """A detection in a table."""

    image: str
    """The name of the file, as the table has it."""
    name: str
    """The class."""
    corners: tuple[float, float, float, float]
    """xyxy, in pixels."""
    score: float
    """1 where the table has none."""
    size: tuple[int, int] | None
    """Height and width of the image, if the table has them."""


class Table(Source):
    """A folder with tables of boxes.

    Attributes:
        root: The folder.
        files: The tables of each split; '' for all in one.
    """

    def __init__(self, root: Path, files: Mapping[str, Path]) -> None:
        self.root = root
        self.files = files
        self._tried: set[Path] = set()
        self._broken: set[tuple[Path, str]] = set()
        self._paths: dict[tuple[Path, str], Path | None] = {}

    def files_read(self) -> tuple[object, ...]:
        return self.root, *sorted(self.files.items())

    def read(self) -> Reading:
        names = (path.relative_to(self.root) for path in self.files.values())
        layout = f'table of boxes ({", ".join(map(str, names))})'
        reading = Reading(layout, self.root)
        lookup = Lookup(self.root)
        role = with_validation(list(self.files))
        if role.get('test') == 'val':
            reading.note('splits', 'test is used for validation')
        found: set[str] = set()
        for split, path in self.files.items():
            self._read(reading, path, role[split], lookup, found)
        reading.classes = sorted(found)
        for path in images_below(self.root):
            if path not in self._tried:
                reading.faults.image(BARE, reading.short(path))
        return reading

    def _read(
        self,
        reading: Reading,
        path: Path,
        role: str,
        lookup: Lookup,
        found: set[str],
    ) -> None:
        columns = columns_of(path)
        assert columns is not None
        where = reading.short(path)
        described = _descriptions(path.parent)
        rows = list(_rows(path))[columns.header :]
        boxes = [_values(row, columns) for row in rows]
        given = [value for box in boxes for value in box or ()]
        # As Open Images has them.
        fractions = bool(given) and -0.01 <= min(given) <= max(given) <= 1.01
        if fractions:
            reading.note('boxes', 'fractions of the image, read as such')
        if columns.name is None:
            reading.note('classes', f'{where} names none')
        for number, (row, box) in enumerate(
            zip(rows, boxes, strict=True), 1 + columns.header
        ):
            place = f'{where}, row {number}'
            image = self._image(row, columns, path, lookup, place, reading)
            if image is None:
                continue
            picture = self._picture(row, columns, image, role, reading)
            name = 'object'
            if columns.name is not None:
                name = _cell(row, columns.name)
            if picture is None:
                continue
            if box is None or not name:
                cells = [_cell(row, index) for index in columns.box]
                if any(cells) or (name and columns.name is not None):
                    text = f'{place}: {shown(",".join(row))}'
                    reading.faults.box(ROWS, text)
                continue  # or an image without objects
            name = described.get(name, name)
            found.add(name)
            x, y, width, height = box
            if columns.corners:
                width, height = width - x, height - y
            if fractions:
                x, width = x * picture.width, width * picture.width
                y, height = y * picture.height, height * picture.height
            crowd = columns.crowd is not None and (
                _cell(row, columns.crowd) == '1'
            )
            picture.add(name, (x, y, width, height), crowd=crowd)

    def _image(
        self,
        row: list[str],
        columns: Columns,
        table: Path,
        lookup: Lookup,
        place: str,
        reading: Reading,
    ) -> Path | None:
        """The image of a row; None, and a fault, if there is none."""
        given = _cell(row, columns.image)
        if not given:
            if any(cell.strip() for cell in row):
                reading.faults.box(ROWS, f'{place}: no image')
            return None
        key = table, given
        if key not in self._paths:
            self._paths[key] = self._find(given, table, lookup)
        image = self._paths[key]
        if image is None:
            reading.faults.box(LOST, f'{place}: {shown(given)}')
        return image

    def _picture(
        self,
        row: list[str],
        columns: Columns,
        image: Path,
        role: str,
        reading: Reading,
    ) -> Picture | None:
        """Take in the image of a row, once; None if it cannot be opened."""
        self._tried.add(image)
        if columns.split is not None:
            role = ALIASES.get(_cell(row, columns.split).lower(), role)
        if (image, role) in self._broken:
            return None
        size = _numbers(row, columns.size) if columns.size else None
        picture = reading.picture(image, role, size or ())
        if picture is None:
            self._broken.add((image, role))
        return picture

    def _find(self, given: str, table: Path, lookup: Lookup) -> Path | None:
        for base in (table.parent, self.root):
            path = base / given.replace('\\', '/')
            with suppress(OSError, ValueError):
                if is_image(path.name) and path.is_file():
                    return path
        return lookup.find(given, table.parent)


@dataclass
class Rows:
    """What a table of detections holds.

    Attributes:
        found: The detections.
        bare: The names of images in whose row there is no box.
        wrong: The rows that cannot be read.
    """

    found: list[Row] = field(default_factory=list)
    bare: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def read_rows(path: Path) -> Rows:
    """Read a table of detections without looking for its images.

    Raises:
        DataError: If its columns are of no boxes, or the boxes are fractions
            of the images.
    """
    columns = _checked_columns(path)
    rows = Rows()
    for number, row in enumerate(list(_rows(path))[columns.header :]):
        image = _cell(row, columns.image)
        if detection := _detection(row, columns):
            rows.found.append(detection)
        elif image and not any(_cell(row, index) for index in columns.box):
            rows.bare.append(image)
        elif any(row):
            text = f'row {number + 1 + columns.header}'
            rows.wrong.append(f'{text}: {shown(",".join(row))}')
    most = max((max(row.corners) for row in rows.found), default=2.0)
    if most <= 1.01:  # as Open Images has them
        raise data_error(
            path,
            'boxes in pixels',
            'fractions of the image',
            'Multiply them by its width and height.',
        )
    return rows


def _detection(row: list[str], columns: Columns) -> Row | None:
    image, box = _cell(row, columns.image), _values(row, columns)
    name = 'object' if columns.name is None else _cell(row, columns.name)
    scores: Sequence[float] | None = [1.0]
    if columns.score is not None:
        scores = _numbers(row, [columns.score])
    if not (image and box and name and scores and 0 <= scores[0] <= 1):
        return None
    left, top, right, bottom = box
    if not columns.corners:
        right, bottom = left + right, top + bottom
    sides = _numbers(row, columns.size) if columns.size else None
    size = (int(sides[1]), int(sides[0])) if sides else None
    return Row(image, name, (left, top, right, bottom), scores[0], size)


def _cell(row: list[str], index: int) -> str:
    return row[index].strip() if index < len(row) else ''


def _numbers(row: list[str], indices: Sequence[int]) -> list[float] | None:
    try:
        values = [float(row[index]) for index in indices]
    except (ValueError, IndexError):
        return None
    return values if all(map(is_number, values)) else None


def _values(row: list[str], columns: Columns) -> list[float] | None:
    """The four numbers of a row's box; None if they are not there."""
    if len(columns.box) == 4:
        return _numbers(row, columns.box)
    cell = _cell(row, columns.box[0]).strip('[]() ')
    cells = cell.replace(',', ' ').split()
    return _numbers(cells, range(4)) if len(cells) == 4 else None


def _rows(path: Path, most: int | None = None) -> Iterator[list[str]]:
    """The rows of a table, whatever separates its columns."""
    if most is None:
        content = read_bytes(path, LARGEST, 'a table', REMEDY)
    else:
        with path.open('rb') as file:
            content = file.read(most)
    try:
        text = content.decode('utf-8-sig')
    except UnicodeDecodeError:
        text = content.decode('latin-1')
    lines = text.splitlines()
    first = lines[0] if lines else ''
    separator = max(',;\t', key=first.count)
    try:
        yield from csv.reader(lines, delimiter=separator)
    except csv.Error as error:
        raise data_error(path, 'a table', f'"{error}"', REMEDY) from None


def columns_of(path: Path) -> Columns | None:
    """Recognise the columns of a table; None if they are of no boxes."""
    try:
        start = [
            row for row, _ in zip(_rows(path, 65536), range(3), strict=False)
        ]
    except (OSError, DataError):
        return None
    if not start:
        return None
    heads = [cell.strip().lower().replace(' ', '_') for cell in start[0]]

    def index(names: tuple[str, ...]) -> int | None:
        return next((heads.index(n) for n in names if n in heads), None)

    image = index(IMAGE)
    if image is None:
        return _headerless(start)
    names = next((n for n in CORNERS + SIDES if set(n) <= set(heads)), None)
    single = index(BOX)
    if names is not None:
        box = [heads.index(name) for name in names]
    elif single is not None:
        box = [single]
    else:
        return None
    used = {image, *box}
    free = [n for n in CLASS if n in heads and heads.index(n) not in used]
    columns = Columns(image, box, names in CORNERS, index(tuple(free)))
    columns.score = index(SCORE)
    columns.split = index(SPLIT)
    columns.crowd = index(('isgroupof', 'iscrowd'))
    for width, height in (
        ('width', 'height'),
        ('image_width', 'image_height'),
        ('img_width', 'img_height'),
    ):
        if width in heads and height in heads:
            size = heads.index(width), heads.index(height)
            if not set(size) & used:
                columns.size = size
    return columns


def _checked_columns(path: Path) -> Columns:
    """Recognise the columns of a table.

    Raises:
        DataError: If they are of no boxes.
    """
    if columns := columns_of(path):
        return columns
    first = next(_rows(path, 65536), [])
    raise data_error(
        path,
        'columns of an image, a class and a box (filename, class, xmin, '
        'ymin, xmax, ymax)',
        shown(', '.join(first)),
        'Name the columns so.',
    )


def _headerless(start: list[list[str]]) -> Columns | None:
    for row in start:
        if len(row) != 6 or not is_image(row[0].strip()):
            return None
        if _numbers(row, range(1, 5)) is None and any(row[1:]):
            return None
    return Columns(0, [1, 2, 3, 4], True, 5, header=False)


def _descriptions(folder: Path) -> dict[str, str]:
    """Open Images' names of its codes, if they are beside the table."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob('*class-descriptions*.csv')):
        found |= {row[0]: row[1] for row in _rows(path) if len(row) == 2}
    return found


# -------------------------------------------------------------------- finding


def find_table(root: Path) -> Table | None:
    """Recognise tables of boxes here and one folder below."""
    paths = [
        path for path in files_in(root, '.csv', '.tsv') if columns_of(path)
    ]
    if not paths:
        return None
    files: dict[str, Path] = {}
    for path in paths:
        split = split_of(path, root)
        if split in files:
            names = some(p.relative_to(root) for p in paths)
            raise data_error(
                root,
                'one table of boxes for each split',
                names,
                'Move the others away, or give one by its path.',
            )
        files[split] = path
    if len(files) > 1:
        files.pop('', None)
    return Table(root, {s: files[s] for s in (*SPLITS, '') if s in files})


def table_of_file(path: Path) -> Table:
    """The data set that a table belongs to: with those of other splits.

    Raises:
        DataError: If its columns are of no boxes.
    """
    _checked_columns(path)
    root = path.parent
    if root.name.lower() in ALIASES or root.name.lower() == 'annotations':
        root = root.parent
    if split_of(path, root) == 'train':
        with suppress(DataError):
            around = find_table(root)
            if around and around.files.get('train') == path:
                return around
    return Table(root, {'': path})
