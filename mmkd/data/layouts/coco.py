"""COCO's layout, under whatever names, and in one file or several.

Roboflow, CVAT and Label Studio write it each in their own way.
"""

import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.errors import DataError

from ..coco import check_coco_content, is_id, object_classes, read_categories
from ..errors import data_error, some
from ..files import check_files, is_number, read_json, shown
from .data import (
    SPLITS,
    Data,
    coco_config,
    coco_metric,
    part_of_coco,
    summarise,
)
from .listing import (
    ALIASES,
    Lookup,
    files_in,
    split_of,
    with_validation,
)
from .reading import Reading, Source

REMEDY = 'Correct the file, or export it again.'
OTHERS = ('panoptic', 'captions', 'stuff', 'keypoints', 'image_info')
"""Files of COCO that are not for detection."""
ROWS = 'entries of images that cannot be read'
LOST = 'images of the annotations that are not there'
BOXES = 'annotations without a box'
UNKNOWN = 'annotations of no known image or category'
SAMPLE = 50
"""So many names decide on the folder of the images."""


class Coco(Source):
    """A folder with annotations in COCO's format.

    Attributes:
        root: The folder.
        files: The annotations of each split; '' for all in one.
        ignored: What is beside them and not read.
    """

    def __init__(
        self,
        root: Path,
        files: Mapping[str, Path],
        ignored: Sequence[Path] = (),
    ) -> None:
        self.root = root
        self.files = files
        self.ignored = ignored
        self._contents: dict[str, Any] = {}

    def files_read(self) -> tuple[object, ...]:
        return self.root, *sorted(self.files.items())

    @property
    def layout(self) -> str:
        files = self.files.values()
        names = (p.relative_to(self.root).as_posix() for p in files)
        return f'COCO ({", ".join(names)})'

    def content(self, split: str) -> dict[str, Any]:
        if split not in self._contents:
            path = self.files[split]
            content = read_json(path, remedy=REMEDY)
            if not isinstance(content, dict) or not all(
                isinstance(content.get(key), list)
                for key in ('images', 'annotations', 'categories')
            ):
                expected = 'lists of images, annotations and categories'
                raise data_error(path, expected, _kind(content), REMEDY)
            self._contents[split] = content
        return self._contents[split]

    def origin(self) -> dict[str, Any]:
        """What :mod:`.convert` has noted in the files, if it wrote them."""
        return origin_of(self.content(next(iter(self.files))))

    # -------------------------------------------------------- as it stands

    def as_it_stands(self) -> Data | None:
        if not {'train', 'val'} <= self.files.keys():
            return None
        splits = [split for split in SPLITS if split in self.files]
        for split in splits:
            self._check_categories(split)
        folders, contents = {}, {}
        for split in splits:
            content = self.content(split)
            folder = self._folder(split)
            if folder is None or not self._is_plain(split, folder):
                return None
            folders[split], contents[split] = folder, content
        classes, groups = self._classes()
        names = [
            [row['name'] for row in contents[s]['categories']] for s in splits
        ]
        if any(each != names[0] for each in names):
            return None  # labels have the order of their file
        data = {
            split: coco_config(
                self.root,
                self.files[split].relative_to(self.root).as_posix(),
                self._prefix(folders[split]),
            )
            for split in splits
        }
        parts = {split: part_of_coco(contents[split]) for split in splits}
        origin = self.origin()
        layout = f'{self.layout} in {self.root}'
        if origin:
            layout += f', made of {origin["source"]} ({origin["layout"]})'
        notes: dict[str, list[str]] = {}
        self._note_ignored(notes)
        return Data(
            tuple(classes),
            data['train'],
            data['val'],
            coco_metric(self.files['val']),
            tuple(groups),
            data.get('test'),
            summarise(layout, parts, classes, notes=notes),
            images=parts['train'].images,
        )

    def _prefix(self, folder: Path) -> str:
        """How a config names a folder of images, '' for the root."""
        if not folder.is_relative_to(self.root):
            return folder.as_posix()
        name = folder.relative_to(self.root).as_posix()
        return '' if name == '.' else name

    def _is_plain(self, split: str, folder: Path) -> bool:
        """Whether mmdet and COCO's evaluation read the file as it is meant.

        The evaluation needs ``iscrowd``, and takes an annotation with the id 0
        for none.
        """
        content, path = self.content(split), self.files[split]
        try:
            if origin_of(content):
                names = (row['file_name'] for row in content['images'])
                check_files(folder, names, path, REMEDY)
                return True
            check_coco_content(path, content, folder)
        except DataError:
            return False
        return all(
            row['id'] != 0 and row.get('iscrowd') in (0, 1)
            for row in content['annotations']
        )

    def _folder(self, split: str) -> Path | None:
        """The folder that the names of a split's images begin in."""
        content, path = self.content(split), self.files[split]
        origin = origin_of(content)
        if origin:
            return Path(origin['images'])
        names = [
            row['file_name']
            for row in content['images']
            if isinstance(row, dict) and isinstance(row.get('file_name'), str)
        ]
        names = names[:: max(1, len(names) // SAMPLE)]
        stem = path.stem.removeprefix('instances_')
        same = [name for name in ALIASES if ALIASES[name] == split]
        inner = [stem, *same, '']
        places = [
            base / name
            for name in dict.fromkeys(inner)
            for base in (self.root, self.root / 'images')
        ]
        for place in (path.parent, *places):
            if (
                place.is_dir()
                and names
                and all((place / name).is_file() for name in names)
            ):
                return place
        return None

    def _classes(self) -> tuple[list[str], list[str]]:
        first, *others = self.files
        return object_classes(
            self.files[first],
            self.content(first),
            *map(self.content, others),
            remedy=REMEDY,
        )

    def _note_ignored(self, notes: dict[str, list[str]]) -> None:
        if self.ignored:
            names = (p.relative_to(self.root) for p in self.ignored)
            notes.setdefault('layout', []).append(f'not read: {some(names)}')

    # ------------------------------------------------------------- reading

    def read(self) -> Reading:
        reading = Reading(self.layout, self.root)
        for split in self.files:
            self._check_categories(split)
        reading.classes, reading.groups = self._classes()
        for split in self.files:  # a class may be in one of them alone
            for row in self.content(split)['categories']:
                known = (*reading.classes, *reading.groups)
                if row['name'] not in known:
                    reading.classes.append(row['name'])
        self._note_ignored(reading.notes)
        lookup = Lookup(self.root)
        role = with_validation(list(self.files))
        if role.get('test') == 'val':
            reading.note('splits', 'test is used for validation')
        for split in self.files:
            self._read(reading, split, role[split], lookup)
        return reading

    def _check_categories(self, split: str) -> None:
        for index, row in enumerate(self.content(split)['categories']):
            if not (
                isinstance(row, dict)
                and is_id(row.get('id'))
                and isinstance(row.get('name'), str)
            ):
                where = f'{self.files[split]}: categories[{index}]'
                expected = 'an object with id and name'
                raise data_error(where, expected, shown(row), REMEDY)

    def _read(
        self, reading: Reading, split: str, role: str, lookup: Lookup
    ) -> None:
        content, faults = self.content(split), reading.faults
        where = reading.short(self.files[split])
        folder, pictures, lost = self._folder(split), {}, set()
        for index, row in enumerate(content['images']):
            known = isinstance(row, dict) and is_id(row.get('id'))
            if not known or not isinstance(row.get('file_name'), str):
                faults.image(ROWS, f'{where}, images[{index}]: {shown(row)}')
                continue
            name, key = row['file_name'], row['id']
            if key in pictures or key in lost:
                text = f'{where}, images[{index}]: the id {key} again'
                faults.image(ROWS, text)
                continue
            path = folder / name if folder else None
            if path is None or not path.is_file():
                path = lookup.find(name, self.files[split].parent)
            picture = None
            if path is None:
                faults.image(LOST, f'{where}: {shown(name)}')
            else:
                size = row.get('width'), row.get('height')
                picture = reading.picture(path, role, size)
            if picture is None:
                lost.add(key)
            else:
                pictures[key] = picture
        names = {row['id']: row['name'] for row in content['categories']}
        for index, row in enumerate(content['annotations']):
            problem = _problem(row, names, pictures, lost)
            if problem:
                kind, why = problem
                faults.box(kind, f'{where}, annotations[{index}]: {why}')
            elif row['image_id'] in pictures:
                _add(row, pictures[row['image_id']], names)


def _problem(
    row: Any, names: Mapping[Any, str], pictures: Mapping[Any, Any], lost: Any
) -> tuple[str, str] | None:
    """What is wrong with an annotation, if it cannot be represented."""
    if not isinstance(row, dict) or _box(row) is None:
        return BOXES, shown(row)
    for key, known in (
        ('image_id', (pictures, lost)),
        ('category_id', (names,)),
    ):
        value = row.get(key)
        if not is_id(value) or not any(value in each for each in known):
            return UNKNOWN, f'{key} {shown(value)}'
    return None


def _add(row: Mapping[str, Any], picture: Any, names: Any) -> None:
    area: Any = row.get('area')
    picture.add(
        names[row['category_id']],
        _box(row),
        crowd=bool(row.get('iscrowd')),
        area=area if is_number(area) and area > 0 else None,
        outline=row.get('segmentation') or None,
    )


def _box(row: Mapping[str, Any]) -> Any:
    """The box of an annotation, or the one around its outline."""
    box, outline = row.get('bbox'), row.get('segmentation')
    if isinstance(box, list) and len(box) == 4 and all(map(is_number, box)):
        return tuple(box)
    if box or not isinstance(outline, list):
        return None
    values = [v for e in outline for v in (e if isinstance(e, list) else [e])]
    if len(values) > 5 and all(map(is_number, values)):
        xs, ys = values[::2], values[1::2]
        left, top = min(xs), min(ys)
        return left, top, max(xs) - left, max(ys) - top
    return None


def origin_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """What :mod:`.convert` has noted in a file; {} in those of others."""
    info = content.get('info')
    found = info.get('mmkd') if isinstance(info, dict) else None
    keys = ('source', 'images', 'layout')
    if isinstance(found, dict) and all(
        isinstance(found.get(key), str) for key in keys
    ):
        return found
    return {}


def _kind(content: object) -> str:
    if isinstance(content, dict):
        return f'the keys {some(map(shown, content), 5)}' if content else '{}'
    return f'a {type(content).__name__}'


# -------------------------------------------------------------------- finding


def is_coco(path: Path) -> bool:
    """Whether a file looks like COCO's format; it is not parsed."""
    if not read_categories(path):
        return False
    with (
        path.open('rb') as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return all(
            content.find(key) >= 0 for key in (b'"images"', b'"annotations"')
        )


def find_coco(root: Path) -> Coco | None:
    """Recognise the layout by JSON files here and one folder below."""
    paths = [path for path in files_in(root, '.json') if is_coco(path)]
    plain = [p for p in paths if not any(o in p.stem for o in OTHERS)]
    paths = plain or paths
    if not paths:
        return None
    by_split: dict[str, list[Path]] = {}
    for path in paths:
        by_split.setdefault(_split(path, root), []).append(path)
    if len(by_split) > 1:
        by_split.pop('', None)
    files = {
        split: _one(found, split, root) for split, found in by_split.items()
    }
    ordered = {s: files[s] for s in (*SPLITS, '') if s in files}
    ignored = [path for path in paths if path not in files.values()]
    return Coco(root, ordered, ignored)


def _split(path: Path, root: Path) -> str:
    if split := split_of(path, root):
        return split
    stem = path.stem.lower()
    return next((split for split in SPLITS if split in stem), '')


def _one(paths: list[Path], split: str, root: Path) -> Path:
    """Choose the annotations of a split, if it is clear which they are."""
    for kind in (
        [p for p in paths if p.stem.startswith('instances')],
        [p for p in paths if p.stem.rstrip('0123456789') == split],
        paths,
    ):
        if len(kind) == 1:
            return kind[0]
    names = some(path.relative_to(root) for path in paths)
    of = f'of the split "{split}"' if split else 'of the whole'
    raise data_error(
        root,
        f'one file {of}',
        f'{len(paths)}: {names}',
        'Move the others away, or give one by its path.',
    )


def coco_of_file(path: Path) -> Coco:
    """The data set that a file belongs to: with those of other splits."""
    folder = path.parent
    root = (
        folder.parent
        if folder.name.lower() in ('annotations', 'labels', 'result', *ALIASES)
        else folder
    )
    if _split(path, root) == 'train':
        around = find_coco(root)
        if around and around.files.get('train') == path:
            return around
    return Coco(root, {'': path})
