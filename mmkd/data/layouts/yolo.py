"""YOLO's layout: a text file for each image, in which each line is a box.

The lists of images are in a YAML file (Ultralytics, Roboflow), in ``obj.data``
(Darknet, CVAT), or follow from the names of the folders.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from mmkd.errors import DataError

from ..errors import data_error, some
from ..files import read_bytes, shown
from .listing import (
    ALIASES,
    images_below,
    is_image,
    split_of,
    split_of_folder,
    suffix_of,
    with_validation,
)
from .reading import Picture, Reading, Source

LARGEST = 1 << 20
"""Bytes of a YAML file, which takes a minute a megabyte."""
LARGEST_LABELS = 1 << 24
NAMES = ('classes.txt', 'obj.names', 'names.txt', 'labels.txt')
"""Files with the name of a class in each line."""
NO_LABELS = (
    *NAMES,
    'predefined_classes.txt',
    'requirements.txt',
    'train.txt',
    'val.txt',
    'valid.txt',
    'test.txt',
)
LABELS = ('labels', 'label', 'annotations')
"""Folders of labels beside one of images."""
REMEDY = 'A line of YOLO is "class x_centre y_centre width height".'
LISTED = 'images of a list that are not there'
LINES = 'lines that cannot be read'
CLASSES = 'lines with a class that has no name'
ALONE = 'label files without an image'
FILES = 'label files that cannot be read'


class Yolo(Source):
    """A folder in YOLO's layout.

    Attributes:
        root: The folder.
        about: What it was recognised by.
        options: What its YAML file or ``obj.data`` says.
    """

    def __init__(
        self, root: Path, about: str, options: Mapping[str, Any]
    ) -> None:
        self.root = root
        self.about = about
        self.options = options
        self._labels: set[Path] = set()
        self._used: set[Path] = set()
        self._forms: dict[str, int] = {}
        self._sought: list[str] = []
        self._places: dict[Path, list[Path]] = {}
        self._cache: dict[Path, tuple[frozenset[str], dict[str, str]]] = {}

    def files_read(self) -> tuple[object, ...]:
        return self.root, self.about

    # ------------------------------------------------------------- reading

    def read(self) -> Reading:
        reading = Reading(f'YOLO ({self.about})', self.root)
        images = self._images(reading)
        if not any(images.values()):
            raise data_error(
                self.root,
                'the images of YOLO labels',
                f'none ({self.about}; looked for {", ".join(self._sought)})',
                'Put the images there, or correct the paths.',
            )
        found: list[tuple[Picture, int, tuple[float, ...], str]] = []
        for split, paths in images.items():
            for path in paths:
                label = self._label_of(path)
                picture = reading.picture(path, split)
                if label is None:
                    continue
                self._used.add(label)
                if picture is None:
                    continue
                text = self._text(label, reading)
                if text is None:
                    del reading.pictures[str(path), split]
                    continue
                for index, box, where in self._lines(text, label, reading):
                    found.append((picture, index, box, where))
        if not self._used:
            raise data_error(
                self.root,
                'a label file (.txt) for each image, beside it or in '
                'labels/ where images/ has the image',
                f'{sum(map(len, images.values())):,} images and none',
                'Export the labels again, or put them there.',
            )
        names = self._names(reading)
        if names is None:
            reading.numbered = True
            used = sorted({index for _, index, _, _ in found})
            names = {index: f'class_{index}' for index in used}
        reading.classes = list(dict.fromkeys(names.values()))
        for picture, index, (x, y, w, h), where in found:
            if index not in names:
                known = f'{len(names)} names'
                reading.faults.box(CLASSES, f'{where}: {index}, of {known}')
                continue
            width, height = picture.width, picture.height
            box = (x - w / 2) * width, (y - h / 2) * height
            picture.add(names[index], (*box, w * width, h * height))
        self._find_alone(images, reading)
        return reading

    def _text(self, label: Path, reading: Reading) -> str | None:
        try:
            content = read_bytes(label, LARGEST_LABELS, 'labels', REMEDY)
        except DataError as error:
            why = str(error).partition(': ')[2]
            reading.faults.image(FILES, f'{reading.short(label)}: {why}')
            return None
        return content.decode('utf-8-sig', errors='replace')

    def _lines(
        self, text: str, label: Path, reading: Reading
    ) -> Iterator[tuple[int, tuple[float, ...], str]]:
        faults, short = reading.faults, reading.short(label)
        lines = text.splitlines()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f'{short}, line {number}'
            try:
                index, box, form = parse(line, self._keypoints)
            except ValueError as error:
                faults.box(LINES, f'{where}: {error}')
                continue
            self._forms[form] = self._forms.get(form, 0) + 1
            yield index, box, where

    def _find_alone(
        self, images: Mapping[str, list[Path]], reading: Reading
    ) -> None:
        """Note the label files that no image has, and what forms there are."""
        for form, count in self._forms.items():
            if form:
                reading.note('boxes', form.format(f'{count:,}'))
        folders = {path.parent for paths in images.values() for path in paths}
        stems = {
            os.path.splitext(name)[0]
            for folder in folders
            for name in self._files(folder)
            if is_image(name)
        }
        for folder in sorted(self._labels):
            for stem, name in sorted(self._files_txt(folder).items()):
                path = folder / name
                if path in self._used or name.lower() in NO_LABELS:
                    continue
                if stem not in stems and first_is_label(path):
                    reading.faults.image(ALONE, reading.short(path))

    # -------------------------------------------------------------- images

    @cached_property
    def _keypoints(self) -> int:
        """How many numbers of keypoints follow a box."""
        shape = self.options.get('kpt_shape')
        if isinstance(shape, list) and len(shape) == 2:
            texts = [str(each) for each in shape]
            if all(map(str.isdecimal, texts)):
                return int(texts[0]) * int(texts[1])
        return 0

    def _images(self, reading: Reading) -> dict[str, list[Path]]:
        """The images of each split."""
        found: dict[str, list[Path]] = {}
        for key, value in self.options.items():
            split = ALIASES.get(key)
            entries = value if isinstance(value, list) else [value]
            for entry in entries if split else ():
                if isinstance(entry, str) and entry.strip():
                    paths = self._entry(f'{key}: {entry}', entry, reading)
                    found.setdefault(split or '', []).extend(paths)
        if not any(found.values()):
            found = {}
            for path in self._lists():
                split = split_of(path, self.root)
                found[split] = self._list(path, reading)
        if not any(found.values()):
            found = {}
            self._sought.append(f'images in {self.root}')
            for path in images_below(self.root):
                split = split_of_folder(path, self.root)
                found.setdefault(split, []).append(path)
        role = with_validation(list(found))
        if role.get('test') == 'val':
            reading.note('splits', 'test is used for validation')
        return {role[s]: list(dict.fromkeys(p)) for s, p in found.items()}

    def _lists(self) -> list[Path]:
        """Lists of images beside ``obj.names`` or a YAML without them."""
        names = ('train.txt', 'val.txt', 'valid.txt', 'test.txt')
        paths = [self.root / name for name in names]
        return [p for p in paths if p.is_file() and lists_images(p)]

    def _entry(self, said: str, entry: str, reading: Reading) -> list[Path]:
        """The images that an entry of the YAML file stands for."""
        place = self._place(entry)
        if place is None:
            self._sought.append(said)
            reading.note('splits', f'not there: {said}')
            return []
        if place.is_dir():
            paths = images_below(place)
            if not paths:
                self._sought.append(str(place))
            return paths
        if is_image(place.name):
            return [place]
        return self._list(place, reading)

    def _place(self, entry: str) -> Path | None:
        """Find a path that may have been written for another machine."""
        text = entry.strip().replace('\\', '/')
        base = str(self.options.get('path') or '').replace('\\', '/')
        inside = text
        while inside.startswith(('../', './')):
            inside = inside.partition('/')[2]
        tries = [
            self.root / base / text,
            self.root / inside,
            self.root / Path(base).name / inside,
            self.root / text,
        ]
        if text.startswith('../'):  # Roboflow writes it for what is beside
            tries.insert(0, self.root / inside)
        if base:
            tries.append(Path(base) / text)
        if text.startswith(('/', 'data/')) or text[1:3] == ':/':
            # as /content/drive/x of another machine, or Darknet's data/x
            parts = text.split('/')
            tries += [
                self.root.joinpath(*parts[i:]) for i in range(1, len(parts))
            ]
        for path in tries:
            if path.exists():
                return Path(os.path.abspath(path))
        return None

    def _list(self, path: Path, reading: Reading) -> list[Path]:
        """The images that a text file lists."""
        content = read_bytes(path, 1 << 28, 'a list of images', REMEDY)
        text = content.decode('utf-8-sig', errors='replace')
        starts: dict[str, Path | None] = {}
        found = []
        for number, line in enumerate(text.splitlines(), 1):
            line = line.strip().replace('\\', '/')
            if not line:
                continue
            folder, _, name = line.rpartition('/')
            if folder not in starts:
                starts[folder] = self._place(folder or '.')
                beside = path.parent / folder
                if folder.startswith('.') and beside.is_dir():
                    starts[folder] = Path(os.path.abspath(beside))
            start = starts[folder]
            if start is not None and name in self._files(start):
                found.append(start / name)
            else:
                where = f'{reading.short(path)}, line {number}'
                reading.faults.image(LISTED, f'{where}: {shown(line)}')
        return found

    # -------------------------------------------------------------- labels

    def _files(self, folder: Path) -> frozenset[str]:
        return frozenset(self._listing(folder)[0])

    def _files_txt(self, folder: Path) -> dict[str, str]:
        """The text files of a folder: their stems to their names."""
        return self._listing(folder)[1]

    def _listing(self, folder: Path) -> tuple[frozenset[str], dict[str, str]]:
        if folder not in self._cache:
            try:
                names = os.listdir(folder)
            except OSError:
                names = []
            texts = {
                os.path.splitext(name)[0]: name
                for name in names
                if suffix_of(name) == '.txt'
            }
            self._cache[folder] = frozenset(names), texts
        return self._cache[folder]

    def _label_of(self, image: Path) -> Path | None:
        """The label file of an image."""
        folder = image.parent
        if folder not in self._places:
            self._places[folder] = list(label_folders(folder))
        for place in self._places[folder]:
            name = self._files_txt(place).get(image.stem)
            if name is not None and name.lower() not in NO_LABELS:
                self._labels.add(place)
                return place / name
        return None

    # --------------------------------------------------------------- names

    def _names(self, reading: Reading) -> dict[int, str] | None:
        """The name of each number; None if nothing says it."""
        names = self.options.get('names')
        if isinstance(names, str) and names:
            place = self._place(names)
            if place is None or not place.is_file():
                raise data_error(
                    self.root,
                    f'names of the classes in {names}',
                    'nothing',
                    'Correct "names".',
                )
            names = read_names(place)
        if not names:
            folders = [self.root, *self._named_folders()]
            for path in (f / n for f in folders for n in NAMES):
                if path.is_file() and (names := read_names(path)):
                    reading.note('classes', f'named by {reading.short(path)}')
                    break
        if not names:
            return None
        rows = names.items() if isinstance(names, dict) else enumerate(names)
        found = {}
        for key, name in rows:
            if not str(key).strip().isdecimal() or not isinstance(name, str):
                raise data_error(
                    f'{self.root} ({self.about})',
                    'names as a list, or each with its number',
                    f'{shown(key)}: {shown(name)}',
                    'Correct "names".',
                )
            found[int(key)] = name.strip() or f'class_{key}'
        twice = sorted(
            {n for n in found.values() if list(found.values()).count(n) > 1}
        )
        if twice:
            reading.note('classes', f'several numbers for {some(twice)}')
        count = str(self.options.get('nc', len(found)))
        if count.isdecimal() and int(count) != len(found):
            reading.note('classes', f'nc is {count}, and {len(found)} named')
        return dict(sorted(found.items()))

    def _named_folders(self) -> list[Path]:
        """Where a tool may have left the names: with the labels."""
        folders = sorted(self._labels)
        folders += [p.parent for p in folders]
        below = [self.root / name for name in LABELS]
        return list(dict.fromkeys([*folders, *below]))


# ---------------------------------------------------------------------- lines


def parse(line: str, keypoints: int = 0) -> tuple[int, tuple[float, ...], str]:
    """Read a line of a label file.

    Args:
        line: Class and box, or class and outline, as fractions of the image.
        keypoints: How many numbers of keypoints follow a box.

    Returns:
        The class, ``(x, y, width, height)`` with the centre first, and how the
        form is said if it is no plain box, with ``{}`` for a count.

    Raises:
        ValueError: If it cannot be read; says why.

    Example:
        >>> from mmkd.data.layouts.yolo import parse
        >>> parse('2 0.5 0.5 0.25 0.5')
        (2, (0.5, 0.5, 0.25, 0.5), '')
        >>> parse('2 0.25 0.25 0.75 0.25 0.75 0.5')[1]
        (0.5, 0.375, 0.5, 0.25)
    """
    words = line.split()
    if len(words) < 5:
        raise ValueError(f'{len(words)} values instead of 5: {shown(line)}')
    try:
        number, *values = map(float, words)
    except ValueError:
        raise ValueError(f'no numbers: {shown(line)}') from None
    if not all(math.isfinite(v) and abs(v) < 1e9 for v in (number, *values)):
        raise ValueError(f'no finite numbers: {shown(line)}')
    if number < 0 or number != int(number):
        raise ValueError(f'{words[0]} is no number of a class')
    index = int(number)
    if len(words) == 5 or (keypoints and len(values) == 4 + keypoints):
        form = '' if len(words) == 5 else '{} with keypoints, left out'
        return index, tuple(values[:4]), form
    if len(words) == 6:
        return index, tuple(values[:4]), '{} with a score, left out'
    form = '{} outlines, read as the boxes around them'
    if len(words) == 9:
        form = '{} with 4 corners, read as the boxes around them'
    xs, ys = values[0 : len(values) // 2 * 2 : 2], values[1::2]
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    box = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
    return index, box, form


def first_is_label(path: Path) -> bool:
    """Whether a text file begins with a line of YOLO, or is empty."""
    line = _first_line(path)
    try:
        return not line or bool(parse(line))
    except ValueError:
        return False


def lists_images(path: Path) -> bool:
    return is_image(_first_line(path))


def _first_line(path: Path) -> str:
    try:
        with path.open(encoding='utf-8-sig', errors='replace') as file:
            for _, line in zip(range(100), file, strict=False):
                if line.strip():
                    return line[:10_000].strip()
    except OSError:
        pass
    return ''


def label_folders(folder: Path) -> Iterator[Path]:
    """Where the labels of a folder of images may be, the likeliest first."""
    parts = folder.parts
    for index in reversed(range(1, len(parts))):
        if parts[index].lower() == 'images':
            for name in LABELS:
                yield Path(*parts[:index], name, *parts[index + 1 :])
            break
    yield folder
    for name in LABELS:
        yield folder.parent / name
        yield folder / name
        yield folder.parent.parent / name / folder.name


def read_names(path: Path) -> list[str]:
    """Read a file with the name of a class in each line."""
    content = read_bytes(path, LARGEST, 'the names of classes', REMEDY)
    text = content.decode('utf-8-sig', errors='replace')
    return [line.strip() for line in text.splitlines() if line.strip()]


# -------------------------------------------------------------------- finding


def find_yolo_file(root: Path) -> Yolo | None:
    """Recognise the layout by a YAML file, or by ``obj.data``."""
    usual = [root / n for n in ('data.yaml', 'dataset.yaml', 'data.yml')]
    others = sorted(
        p for p in root.iterdir() if suffix_of(p.name) in ('.yaml', '.yml')
    )
    for path in dict.fromkeys((*usual, *others)):
        with suppress(*[DataError] * (path not in usual)):
            if path.is_file() and (found := yolo_of_file(path)):
                return found
    for path in sorted(root.glob('*.data')):
        if found := yolo_of_file(path):
            return found
    return None


def yolo_of_file(path: Path) -> Yolo | None:
    """The folder that a YAML file or ``obj.data`` describes, if it does."""
    if suffix_of(path.name) == '.data':
        options: Any = _read_data(path)
    else:
        options = _read_yaml(path)
    if not isinstance(options, dict):
        return None
    named = 'names' in options or 'nc' in options
    if not named and not {'train', 'val'} & options.keys():
        return None
    return Yolo(path.parent, path.name, options)


def _read_yaml(path: Path) -> Any:
    """Read a YAML file with every scalar as text, so that "no" is a name."""
    import yaml

    remedy = 'Correct the file.'
    content = read_bytes(path, LARGEST, 'the YAML of a data set', remedy)
    try:
        return yaml.load(content, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = ' '.join(str(error).split())[:200]
        raise data_error(path, 'a YAML file', f'"{why}"', remedy) from None


def _read_data(path: Path) -> dict[str, str]:
    """Read Darknet's ``key = value``."""
    content = read_bytes(path, LARGEST, 'the paths of a data set', REMEDY)
    lines = content.decode('utf-8-sig', errors='replace').splitlines()
    pairs = (line.partition('=') for line in lines)
    options = {k.strip(): v.strip() for k, found, v in pairs if found}
    if 'classes' in options:
        options['nc'] = options.pop('classes')
    return options


def find_yolo_folder(root: Path) -> Yolo | None:
    """Recognise the layout by label files that images have."""
    found = Yolo(root, '', {})
    folders = {path.parent: path for path in images_below(root)}
    for folder in folders:
        for place in label_folders(folder):
            texts = found._files_txt(place)
            both = {
                os.path.splitext(name)[0]
                for name in found._files(folder)
                if is_image(name)
            } & texts.keys()
            named = sorted(texts[stem] for stem in both)
            labels = [n for n in named if n.lower() not in NO_LABELS]
            for name in labels[:20]:
                if _first_line(place / name) and first_is_label(place / name):
                    where = (
                        place.relative_to(root)
                        if (place.is_relative_to(root))
                        else place
                    )
                    if place == folder:
                        found.about = 'labels beside the images, no YAML file'
                    else:
                        found.about = f'{where}/*.txt, no YAML file'
                    return found
    return None
