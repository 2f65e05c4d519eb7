"""Pascal VOC's layout: an XML file for each image, with lists or without."""

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mmkd.errors import DataError

from ..errors import data_error
from ..files import is_number, read_bytes, shown
from ..voc import LARGEST, VocImage, read_voc_split
from .data import Data, Part, summarise
from .listing import (
    ALIASES,
    Lookup,
    images_below,
    is_image,
    split_of_folder,
    suffix_of,
    walk,
    with_validation,
)
from .reading import Box, Reading, Source

REMEDY = 'Correct the file, or export it again.'
SPLITS = (('train', 'val'), ('trainval', 'test'), ('train', 'test'))
"""Lists for training and validation that belong together."""
FILES = 'annotation files that cannot be read'
ALONE = 'annotation files without an image'
BARE = 'images without an annotation file'
LISTED = 'images of a list without an annotation file'
OBJECTS = 'objects without a class or a box'
INDICES = 'The VOC'
"""What ``source/database`` begins with where pixels count from 1."""


@dataclass
class Labels:
    """What an XML file says, as far as it can be read."""

    file_name: str
    size: tuple[Any, ...]
    objects: list[tuple[str, Box, bool]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def read_labels(path: Path) -> Labels:
    """Read an XML file, and leave out the objects that cannot be.

    Boxes are ``xmin, ymin, xmax - xmin, ymax - ymin``: the tools that write
    this XML give plain coordinates. Only the files of VOC itself count pixels
    from 1, the last one inside of the box.

    Raises:
        DataError: If it is no such file at all.
    """
    text = read_bytes(path, LARGEST, 'a VOC annotation', REMEDY)
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        got = f'malformed XML ({error})' if text.strip() else 'an empty file'
        raise data_error(path, 'a VOC annotation', got, REMEDY) from None
    if root.tag != 'annotation':
        got = f'<{root.tag}>'
        raise data_error(path, '<annotation>', got, REMEDY)
    indices = root.findtext('source/database', '').startswith(INDICES)
    size = (_number(root, f'size/{key}') for key in ('width', 'height'))
    found = Labels((root.findtext('filename') or '').strip(), tuple(size))
    for number, node in enumerate(root.findall('object'), 1):
        name = (node.findtext('name') or '').strip()
        corners = [
            _number(node, f'bndbox/{key}')
            for key in ('xmin', 'ymin', 'xmax', 'ymax')
        ]
        if not name or None in corners:
            what = 'no <name>' if not name else 'no four numbers in <bndbox>'
            found.faults.append(f'object {number}: {what}')
            continue
        left, top, right, bottom = (c or 0 for c in corners)
        left, top = left - indices, top - indices
        difficult = (node.findtext('difficult') or '').strip() == '1'
        box = (left, top, right - left, bottom - top)
        found.objects.append((name, box, difficult))
    return found


def _number(node: ElementTree.Element, path: str) -> float | None:
    try:
        value = float(node.findtext(path) or '')
    except ValueError:
        return None
    return value if is_number(value) else None


class Voc(Source):
    """A folder of XML files and images.

    Attributes:
        root: The folder.
        lists: The lists of ``ImageSets/Main``: a name to a file.
    """

    def __init__(self, root: Path, lists: dict[str, Path]) -> None:
        self.root = root
        self.lists = lists
        self._labelled: set[Path] = set()

    # -------------------------------------------------------- as it stands

    def as_it_stands(self) -> Data | None:
        """The data, if each list's XML files and JPEGs are all in order."""
        splits = self._splits()
        if splits is None:
            return None
        images: dict[str, list[tuple[str, VocImage]]] = {}
        try:
            for role, split in splits.items():
                images[role] = list(
                    read_voc_split(self.root, split, None, REMEDY)
                )
        except DataError:
            return None
        parts = {role: Part() for role in images}
        for role, rows in images.items():
            for _, image in rows:
                parts[role].add([item.name for item in image.objects])
        # Labels have the order of their names.
        classes = sorted(set().union(*(p.objects for p in parts.values())))
        root = self.root.parent
        data = {
            role: dict(
                type='VOCDataset',
                data_root=f'{root}/',
                ann_file=f'{self.root.name}/ImageSets/Main/{split}.txt',
                data_prefix=dict(sub_data_root=f'{self.root.name}/'),
            )
            for role, split in splits.items()
        }
        notes = {}
        named = [s for role, s in splits.items() if role != s]
        if named:
            notes['splits'] = [f'lists: {", ".join(splits.values())}']
        return Data(
            tuple(classes),
            data['train'],
            data['val'],
            dict(type='VOCMetric', metric='mAP', eval_mode='area'),
            test=data.get('test'),
            summary=summarise(
                f'Pascal VOC (ImageSets/Main) in {self.root}',
                parts,
                classes,
                notes=notes,
            ),
            images=parts['train'].images,
        )

    def _splits(self) -> dict[str, str] | None:
        """The lists to train, to validate and, if one is left, to test on."""
        for train, val in SPLITS:
            if train in self.lists and val in self.lists:
                splits = dict(train=train, val=val)
                if val != 'test' and 'test' in self.lists:
                    splits['test'] = 'test'
                return splits
        return None

    # ------------------------------------------------------------- reading

    def read(self) -> Reading:
        about = 'ImageSets/Main' if self.lists else 'XML files'
        reading = Reading(f'Pascal VOC ({about})', self.root)
        lookup = Lookup(self.root)
        names: set[str] = set()
        for path, split in self._files(reading):
            try:
                labels = read_labels(path)
            except DataError as error:
                why = str(error).partition(': ')[2]
                reading.faults.image(FILES, f'{reading.short(path)}: {why}')
                continue
            image = self._image_of(path, labels, lookup)
            if image is None:
                reading.faults.image(ALONE, reading.short(path))
                continue
            self._labelled.add(image)
            picture = reading.picture(image, split, labels.size)
            for fault in labels.faults:
                where = f'{reading.short(path)}, {fault}'
                reading.faults.box(OBJECTS, where)
            if picture is None:
                continue
            for name, box, difficult in labels.objects:
                picture.add(name, box, crowd=difficult)
                names.add(name)
        reading.classes = sorted(names)
        if not self.lists:
            self._find_bare(reading)
        return reading

    def _files(self, reading: Reading) -> Iterator[tuple[Path, str]]:
        """The XML files with their splits."""
        if not self.lists:
            paths = [
                p / name
                for p, files in walk(self.root)
                for name in files
                if suffix_of(name) == '.xml'
            ]
            found = [(p, split_of_folder(p, self.root)) for p in paths]
            role = with_validation(list(dict.fromkeys(s for _, s in found)))
            if role.get('test') == 'val':
                reading.note('splits', 'test is used for validation')
            yield from ((path, role[split]) for path, split in found)
            return
        lists = self._splits() or self._roles()
        for split, listed in lists.items():
            yield from self._listed(listed, split, reading)

    def _roles(self) -> dict[str, str]:
        """Lists of other names and numbers, each with its split."""
        found = {
            ALIASES[name]: name
            for name in self.lists
            if name in ALIASES and name != 'trainval'
        }
        if 'train' not in found and 'trainval' in self.lists:
            return {'train': 'trainval'} | found if found else {'': 'trainval'}
        return found or {'': next(iter(self.lists))}

    def _listed(
        self, split: str, role: str, reading: Reading
    ) -> Iterator[tuple[Path, str]]:
        content = read_bytes(self.lists[split], 1 << 28, 'a list', REMEDY)
        lines = content.decode('utf-8-sig', errors='replace').splitlines()
        folder = self.root / 'Annotations'
        for number, line in enumerate(lines, 1):
            name = line.strip().strip('"')
            if not name:
                continue
            tries = [name, os.path.splitext(name)[0], name.rsplit(None, 1)[0]]
            paths = [folder / f'{each}.xml' for each in tries]
            for path in paths:
                if path.is_file():
                    yield path, role
                    break
            else:
                where = f'{reading.short(self.lists[split])}, line {number}'
                reading.faults.image(LISTED, f'{where}: {shown(name)}')

    def _image_of(
        self, path: Path, labels: Labels, lookup: Lookup
    ) -> Path | None:
        """The image of an XML file: of its name, near it."""
        given = PurePosixPath(labels.file_name.replace('\\', '/')).name
        names = [path.stem + suffix_of(given)] if suffix_of(given) else []
        names += [given] if given else []
        inner = path.parent
        places = [inner]
        for folder in ('JPEGImages', 'images', 'Images', 'imgs', 'img'):
            places += [
                inner.parent / folder,
                inner / folder,
                inner.parent.parent / folder / inner.name,
            ]
        for name in names:
            for place in places:
                if is_image(name) and (place / name).is_file():
                    return place / name
        near = inner.parent if inner != self.root else inner
        for name in (path.stem, given):
            found = lookup.find(name, inner) or lookup.find(name, near)
            if name and found:
                return found
        return None

    def _find_bare(self, reading: Reading) -> None:
        """Note images that were not labelled, which is no negative image."""
        for path in images_below(self.root):
            if path not in self._labelled:
                reading.faults.image(BARE, reading.short(path))


# -------------------------------------------------------------------- finding


def find_voc_lists(root: Path) -> Voc | None:
    """Recognise VOC's own layout by its lists of splits."""
    lists = root / 'ImageSets' / 'Main'
    if not lists.is_dir() or not (root / 'Annotations').is_dir():
        return None
    found = {path.stem: path for path in sorted(lists.glob('*.txt'))}
    # Those of a class, as cat_train.txt, are of no use.
    whole = {
        name: path
        for name, path in found.items()
        if name in ALIASES or name == 'default' or len(found) == 1
    }
    return Voc(root, whole) if whole else None


def find_voc_files(root: Path) -> Voc | None:
    """Recognise XML files of VOC in a folder, wherever in it they are."""
    looked = 0
    for folder, files in walk(root):
        for name in files:
            if suffix_of(name) != '.xml':
                continue
            looked += 1
            try:
                read_labels(folder / name)
            except DataError:
                if looked < 20:
                    continue
                return None
            return Voc(root, {})
    return None
