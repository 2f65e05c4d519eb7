"""Annotations as columns: all that the files of a data set say.

The data sets of MMDetection drop silently what they cannot use, so that a
built one does not show what is wrong. Here the files themselves are read.
Faults with which the data set would fail are noted on the way.
"""

import gc
import itertools
import os.path as osp
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mmdet.datasets import CocoDataset, XMLDataset
from mmdet.registry import DATASETS
from mmengine.fileio import list_from_file
from mmengine.registry import DefaultScope

from mmkd.data.datasets import wrapped
from mmkd.data.files import read_json, shown
from mmkd.errors import DataError
from mmkd.utils import named_class

from .faults import Faults
from .report import Severity

READERS = ('load_data_list', 'parse_data_info')
"""What a class overrides if it reads annotations in its own way."""


@dataclass
class Part:
    """A data set that wraps no other, with everything that its files hold."""

    split: str
    file: str
    """The annotation file, or the list of VOC's layout."""
    layout: str
    classes: tuple[str, ...]
    options: Mapping[str, Any]
    """The data set's entry in the config."""
    pipeline: list[Mapping[str, Any]]
    """Its transforms, and then those of the data sets that wrap it."""
    pictures: list[str] = field(default_factory=list)
    """The path of each image."""
    places: list[str] = field(default_factory=list)
    """How messages call each image."""
    sizes: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    """(images, 2), width and height as written; NaN where nothing is."""
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    """(boxes, 4), xyxy in pixels, as the data set computes them."""
    written: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    """(boxes, 4), as the file has them."""
    image: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    """(boxes,), the image of each box."""
    categories: list[str] = field(default_factory=list)
    """The names of the classes in the annotations."""
    category: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    """(boxes,), an index into ``categories``; -1 for none of them."""
    order: tuple[str, ...] = ()
    """The class of each label."""
    crowd: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """(boxes,), crowds and difficult objects: neither learnt nor counted."""
    ignored: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """(boxes,), with COCO's flag ``ignore``, which drops a box."""
    areas: np.ndarray | None = None
    """(boxes,), COCO's ``area``."""
    rows: Sequence[Mapping[str, Any]] = ()
    """COCO's annotations, for what only a few checks look at."""
    annotated: bool = True
    """Whether there are annotations at all; tests come without."""

    @property
    def trains(self) -> bool:
        """Whether the data set filters images, as it does in training."""
        return not self.options.get('test_mode', False)

    def labels(self) -> np.ndarray:
        """Return the index into ``classes`` of each box, -1 for none."""
        known = {name: k for k, name in enumerate(self.classes)}
        table = [*(known.get(name, -1) for name in self.categories), -1]
        return np.array(table, int)[self.category]

    def box(self, index: int) -> str:
        """Say where a box is and what was written."""
        place = self.places[self.image[index]]
        if self.rows:
            place += f' (annotation {shown(self.rows[index].get("id"), 20)})'
        code = self.category[index]
        name = self.categories[code] if code >= 0 else 'no class'
        numbers = ', '.join(f'{v:.6g}' for v in self.written[index])
        return f'{place} {name} [{numbers}]'

    def keep(self, chosen: np.ndarray) -> None:
        """Leave out all boxes that are not chosen."""
        columns = ('boxes', 'written', 'image', 'category', 'crowd', 'ignored')
        for name in columns:
            setattr(self, name, getattr(self, name)[chosen])
        if self.areas is not None:
            self.areas = self.areas[chosen]
        if self.rows:
            self.rows = list(itertools.compress(self.rows, chosen.tolist()))


def parts_of(
    dataset: Mapping[str, Any],
    outer: Sequence[Mapping[str, Any]] = (),
) -> Iterator[tuple[Mapping[str, Any], list[Mapping[str, Any]]]]:
    """Yield the data sets within one, each with all its transforms."""
    pipeline = [*(dataset.get('pipeline') or ()), *outer]
    inner = wrapped(dataset)
    if not inner:
        yield dataset, pipeline
    for each in inner:
        yield from parts_of(each, pipeline)


def read_part(
    split: str,
    dataset: Mapping[str, Any],
    pipeline: list[Mapping[str, Any]],
    faults: Faults,
) -> Part | None:
    """Read the annotations of a data set.

    Returns:
        What they hold; None, with a note, for a class that reads them in a
        way of its own, and with a finding, for a file that cannot be read.
    """
    with DefaultScope.overwrite_default_scope('mmdet'):
        cls = named_class(DATASETS, dataset['type'])
    name = getattr(cls, '__name__', str(dataset['type']))
    reader = _reader(cls)
    remote = dataset.get('backend_args')
    if reader is None or remote:
        why = 'its files are not local' if remote else 'it has its own format'
        text = f'{name} is not looked into: {why}'
        faults.say(f'{split}: {text}.', 'notes')
        return None
    classes = cls._load_metainfo(dataset.get('metainfo')).get('classes') or ()
    if isinstance(classes, str):
        text = f"classes are the text '{classes}' instead of a tuple of names"
        remedy = f"Write classes=('{classes}',)."
        faults.say(f'{split}: {text}. {remedy}', 'stops')
        classes = (classes,)
    file = dataset.get('ann_file') or ''
    part = Part(
        split,
        _joined(dataset.get('data_root'), file),
        'COCO' if reader is _read_coco else 'VOC',
        tuple(classes),
        dataset,
        pipeline,
    )
    # Millions of objects are made, in no circles that Python could collect.
    collects = gc.isenabled()
    gc.disable()
    try:
        reader(part, faults)
    except DataError as error:
        faults.say(f'{split}: {error}', worst(split))
        return None
    except (AttributeError, LookupError, OverflowError, TypeError) as error:
        # such as an id that is a list, at which the data set fails as well
        what = f'{type(error).__name__}: {error}'
        faults.say(
            f'{split}: {part.file} cannot be read ({what}).', worst(split)
        )
        return None
    finally:
        if collects:
            gc.enable()
    _apply_indices(part)
    return part


def _reader(cls: Any) -> Callable[[Part, Faults], None] | None:
    if not isinstance(cls, type):
        return None
    for base, reader in ((CocoDataset, _read_coco), (XMLDataset, _read_voc)):
        own = [getattr(cls, n, 0) is not getattr(base, n) for n in READERS]
        if issubclass(cls, base) and not any(own):
            return reader
    return None


def worst(split: str) -> Severity:
    """What comes of a file that cannot be read; training needs no test."""
    return 'warns' if split == 'test' else 'stops'


def _joined(root: str | None, path: str) -> str:
    """Join paths as MMEngine does."""
    if not path or not root or osp.isabs(path):
        return path or (root or '')
    return osp.join(root, path)


def _apply_indices(part: Part) -> None:
    """Keep the images that the option ``indices`` chooses."""
    indices = part.options.get('indices')
    if indices is None:
        return
    every = np.arange(len(part.pictures))
    if isinstance(indices, int):
        chosen = every[:indices] if indices >= 0 else every[indices:]
    else:
        chosen = every[np.array(indices, int)]
    number = np.full(len(every), -1)
    number[chosen] = np.arange(len(chosen))
    part.keep(number[part.image] >= 0)
    part.image = number[part.image]
    part.pictures = [part.pictures[i] for i in chosen]
    part.places = [part.places[i] for i in chosen]
    part.sizes = part.sizes[chosen]


# ------------------------------------------------------------------------ COCO

TABLES = ('images', 'annotations', 'categories')
KEYS = {
    'images': ('id', 'file_name', 'width', 'height'),
    'annotations': ('id', 'image_id', 'category_id'),
    'categories': ('id', 'name'),
}
"""Without these, pycocotools or the data set fails."""


def _read_coco(part: Part, faults: Faults) -> None:
    content = read_json(part.file, remedy='Check ann_file and data_root.')
    name = osp.basename(part.file)
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise DataError(
            f'{part.file}: expected an object of COCO annotations, got a '
            f'{kind}{" (results of a detector?)" * (kind == "list")}.'
        )
    part.annotated = part.split != 'test' or 'annotations' in content
    missing = [k for k in TABLES if not isinstance(content.get(k), list)]
    if not part.annotated:
        missing = [key for key in missing if key != 'annotations']
    if missing:
        raise DataError(
            f'{part.file}: expected lists of {", ".join(TABLES)}, got none of '
            f'{", ".join(missing)}. It has only '
            f'{", ".join(map(str, content)) or "nothing"}.'
        )
    tables = {
        key: _entries(part, key, content.get(key, ()), faults)
        for key in TABLES
    }
    images = _coco_images(part, name, tables['images'], faults)
    names = {row['id']: str(row['name']) for row in tables['categories']}
    twice = _repeated(tables['categories'], 'name')
    faults.add(
        part.split,
        'stops',
        'category',
        f'twice in {name}, so that their boxes get two labels',
        len(twice),
        [f'"{name}"' for name in twice],
        'Merge them into one.',
    )
    _coco_boxes(part, name, tables['annotations'], images, names, faults)


def _entries(
    part: Part, table: str, rows: Sequence[Any], faults: Faults
) -> list[dict[str, Any]]:
    """Return the entries of a table that have what every reader needs."""
    keys = KEYS[table]
    needed = set(keys)
    if all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        return list(rows)
    good, lacking = [], defaultdict(list)
    for index, row in enumerate(rows):
        lost = [k for k in keys if not (isinstance(row, dict) and k in row)]
        for key in lost[:1]:
            lacking[key].append(f'{table}[{index}]')
        if not lost:
            good.append(row)
    for key, places in lacking.items():
        faults.add(
            part.split,
            'stops',
            'entry',
            f'without "{key}" in {osp.basename(part.file)}',
            len(places),
            places,
        )
    return good


def _repeated(rows: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    values = [row[key] for row in rows]
    if len(set(values)) == len(values):
        return []
    return [value for value, n in Counter(values).items() if n > 1]


def _coco_images(
    part: Part, name: str, rows: list[dict[str, Any]], faults: Faults
) -> dict[Any, int]:
    by_id = {row['id']: row for row in rows}
    twice = _repeated(rows, 'id')
    files = defaultdict(list)
    for row in rows if twice else ():
        files[row['id']].append(str(row['file_name']))
    faults.add(
        part.split,
        'warns',
        'id',
        f'of several images in {name}, of which the last one gets the boxes '
        'of all',
        len(twice),
        [f'{i} ({", ".join(files[i][:3])})' for i in twice],
    )
    rows = list(by_id.values())
    again = _repeated(rows, 'file_name')
    faults.add(
        part.split,
        'warns',
        'image',
        f'named by several entries of {name}: each has only its own boxes',
        len(again),
        list(map(str, again)),
        'Merge the entries.',
    )
    prefix = part.options.get('data_prefix') or {}
    if 'img' not in prefix:
        faults.say(
            f'{part.split}: the data set needs data_prefix=dict(img=...), '
            f'got {dict(prefix)}.',
            worst(part.split),
        )
    folder = prefix.get('img', '')
    if not osp.isabs(folder):
        folder = osp.join(part.options.get('data_root') or '', folder)
    part.places = [str(row['file_name']) for row in rows]
    part.pictures = [osp.join(folder, place) for place in part.places]
    sides = [_column(rows, key) for key in ('width', 'height')]
    part.sizes = np.stack([values for values, _ in sides], axis=1)
    wrong = sorted({i for _, indices in sides for i in indices})
    faults.add(
        part.split,
        'stops',
        'image',
        'with a width or height that is no number',
        len(wrong),
        [part.places[i] for i in wrong],
    )
    return {key: index for index, key in enumerate(by_id)}


def _column(
    rows: Sequence[Mapping[str, Any]], key: str
) -> tuple[np.ndarray, list[int]]:
    """Return the numbers under a key, and which entries have none there."""
    values = [row.get(key) for row in rows]
    wrong = []
    if not set(map(type, values)) <= {int, float}:
        wrong = [i for i, v in enumerate(values) if type(v) not in NUMBERS]
        values = [v if type(v) in NUMBERS else np.nan for v in values]
    return np.array(values, float), wrong


NUMBERS = (int, float)


def _coco_boxes(
    part: Part,
    name: str,
    rows: list[dict[str, Any]],
    images: dict[Any, int],
    names: dict[Any, str],
    faults: Faults,
) -> None:
    image = np.array([images.get(row['image_id'], -1) for row in rows], int)
    lost = np.flatnonzero(image < 0)
    if len(lost):
        texts = {str(key) for key in images}
        kinds = sum(str(rows[i]['image_id']) in texts for i in lost)
        faults.add(
            part.split,
            faults.share(len(lost), len(rows)),
            'annotation',
            f'of images that {name} does not have: dropped',
            len(lost),
            [
                f'annotation {rows[i]["id"]} of image {rows[i]["image_id"]!r}'
                for i in lost[:3]
            ],
            'Image ids are text in one table, and numbers in the other.'
            if kinds
            else '',
        )
        rows = [row for row, i in zip(rows, image, strict=True) if i >= 0]
        image = image[image >= 0]
    twice = _repeated(rows, 'id')
    faults.add(
        part.split,
        worst(part.split),
        'annotation id',
        f'in {name} twice, which CocoDataset refuses',
        len(twice),
        list(map(str, twice)),
        'Number the annotations from 1.',
    )
    values, wrong = _box_column(rows)
    if wrong:
        _say_unreadable(part, rows, image, wrong, faults)
    codes = {key: index for index, key in enumerate(names)}
    category = [codes.get(row['category_id'], -1) for row in rows]
    areas, no_area = _column(rows, 'area')
    reads = [i for i in no_area if not rows[i].get('ignore')]
    faults.add(
        part.split,
        worst(part.split),
        'annotation',
        'without a number as "area", which CocoDataset needs',
        len(reads),
        [f'{part.places[image[i]]} ({rows[i]["id"]})' for i in reads[:3]],
        'Write width × height.',
    )
    part.rows, part.image = rows, image
    part.written = values
    part.boxes = np.hstack([values[:, :2], values[:, :2] + values[:, 2:]])
    part.categories = list(names.values())
    part.category = np.array(category, int)
    known = set(part.classes)
    part.order = tuple(dict.fromkeys(n for n in part.categories if n in known))
    part.areas = areas
    part.crowd = np.array([bool(row.get('iscrowd')) for row in rows], bool)
    part.ignored = np.array([bool(row.get('ignore')) for row in rows], bool)
    good = np.ones(len(rows), bool)
    good[wrong] = False
    part.keep(good)


def _box_column(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[np.ndarray, list[int]]:
    """Return all ``bbox``, and which of them are not four numbers."""
    values: list[Any] = [row.get('bbox') for row in rows]
    lists = set(map(type, values)) <= {list} and set(map(len, values)) <= {4}
    flat = itertools.chain.from_iterable
    wrong = []
    if not lists or not set(map(type, flat(values))) <= set(NUMBERS):
        wrong = [i for i, box in enumerate(values) if not _is_box(box)]
        for index in wrong:
            values[index] = [np.nan] * 4
    count = 4 * len(values)
    numbers = np.fromiter(flat(values), np.float64, count)
    return numbers.reshape(-1, 4), wrong


def _is_box(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(type(v) in NUMBERS for v in value)
    )


def _say_unreadable(
    part: Part,
    rows: list[dict[str, Any]],
    image: np.ndarray,
    wrong: list[int],
    faults: Faults,
) -> None:
    faults.add(
        part.split,
        worst(part.split),
        'box',
        'of other than four numbers',
        len(wrong),
        [
            f'{part.places[image[i]]} (annotation {rows[i]["id"]}) '
            f'{shown(rows[i].get("bbox"), 50)}'
            for i in wrong[:3]
        ],
        'CocoDataset fails at such a box.',
    )


# ------------------------------------------------------------------------- VOC

Objects = list[tuple[str, list[float], bool]]


def _read_voc(part: Part, faults: Faults) -> None:
    try:
        lines = list_from_file(part.file)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f'{part.file}: expected a list of images, got '
            f'"{getattr(error, "strerror", None) or error}". Check ann_file '
            'and data_root.'
        ) from None
    prefix = dict(part.options.get('data_prefix') or {})
    folder = prefix.get('sub_data_root', '')
    if not osp.isabs(folder):
        folder = osp.join(part.options.get('data_root') or '', folder)
    photos = part.options.get('img_subdir', 'JPEGImages')
    labels = part.options.get('ann_subdir', 'Annotations')
    wrong: dict[str, list[str]] = defaultdict(list)
    sizes, found = [], []
    for line in lines:
        place = f'{labels}/{line}.xml'
        size, objects = _read_xml(osp.join(folder, place), place, wrong)
        part.pictures.append(osp.join(folder, photos, f'{line}.jpg'))
        part.places.append(place)
        sizes.append(size)
        found.append(objects)
    for what, places in wrong.items():
        remedy = ''
        if what == 'missing' and any(' ' in place for place in places):
            remedy = f'Each line of {osp.basename(part.file)} is one name.'
        faults.add(
            part.split,
            worst(part.split),
            'annotation file',
            f'{what}, at which {part.options["type"]} fails',
            len(places),
            places,
            remedy,
        )
    twice = [name for name, n in Counter(lines).items() if n > 1]
    faults.add(
        part.split,
        'warns',
        'image',
        f'more than once in {osp.basename(part.file)}',
        len(twice),
        twice,
    )
    part.sizes = np.array(sizes, float).reshape(-1, 2)
    part.image = np.repeat(np.arange(len(found)), list(map(len, found)))
    every = list(itertools.chain.from_iterable(found))
    codes: dict[str, int] = {}
    part.category = np.array(
        [codes.setdefault(name, len(codes)) for name, _, _ in every], int
    )
    part.categories = list(codes)
    part.order = part.classes
    part.written = np.array([b for _, b, _ in every], float).reshape(-1, 4)
    part.boxes = np.trunc(part.written) - 1
    part.crowd = np.array([flag for _, _, flag in every], bool)
    part.ignored = np.zeros(len(every), bool)


def _read_xml(
    path: str, place: str, wrong: dict[str, list[str]]
) -> tuple[tuple[float, float], Objects]:
    """Read what VOC's data set reads, and note at what it would fail."""
    size: tuple[float, float] = (np.nan, np.nan)
    objects: Objects = []
    try:
        with open(path, 'rb') as file:
            root = ElementTree.fromstring(file.read())
    except OSError:
        wrong['missing'].append(place)
        return size, objects
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        wrong['of malformed XML'].append(f'{place} ({error})')
        return size, objects
    node = root.find('size')
    if node is not None:
        try:
            sides = [int(node.find(k).text) for k in ('width', 'height')]  # type: ignore
            size = (sides[0], sides[1])
        except (AttributeError, TypeError, ValueError):
            wrong['whose size is not two whole numbers'].append(place)
    for item in root.findall('object'):
        try:
            objects.append(_read_object(item))
        except (AttributeError, TypeError):
            wrong['with an object without name or box'].append(place)
        except (ValueError, OverflowError) as error:
            what = 'with coordinates or flags that are no numbers'
            wrong[what].append(f'{place} ({error})')
    return size, objects


def _read_object(item: Any) -> tuple[str, list[float], bool]:
    name = item.find('name').text
    difficult = item.find('difficult')
    flag = difficult is not None and bool(int(difficult.text))
    node = item.find('bndbox')
    keys = ('xmin', 'ymin', 'xmax', 'ymax')
    box = [float(node.find(key).text) for key in keys]
    list(map(int, box))  # fails at NaN, as the data set does
    return name or '', box, flag
