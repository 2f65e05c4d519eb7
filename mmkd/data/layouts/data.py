"""What a command trains on, and what is said of it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDERS = {'coco': 'data/coco', 'voc': 'data/VOCdevkit/VOC2007'}
"""Where ``mmkd prepare`` leaves what it makes."""
SPLITS = ('train', 'val', 'test')
NAMED = 8
"""At most so many classes are named in the summary."""


@dataclass
class Data:
    """Training and validation data: the entries of data sets' configs."""

    classes: tuple[str, ...]
    train: dict[str, Any]
    val: dict[str, Any]
    metric: dict[str, Any]
    groups: tuple[str, ...] = ()
    """Categories of the file that group others, and are no classes."""
    test: dict[str, Any] | None = None
    summary: tuple[str, ...] = ()
    """Five lines: layout, images, boxes, classes, splits."""
    faults: dict[str, list[str]] = field(default_factory=dict)
    """What was left out: a kind of fault to each place, ``file, line: why``"""
    images: int | None = None
    """How many images there are to train on, if it is known."""


class Faults:
    """What is left out while data are read."""

    def __init__(self) -> None:
        self.of_images: dict[str, list[str]] = {}
        self.of_boxes: dict[str, list[str]] = {}

    def image(self, kind: str, place: object) -> None:
        """Note an image, or a file of it.

        Args:
            kind: What is wrong with such files, in the plural.
            place: Which file, and why.
        """
        self.of_images.setdefault(kind, []).append(str(place))

    def box(self, kind: str, place: object) -> None:
        """Note a box, or a line; see :meth:`image`."""
        self.of_boxes.setdefault(kind, []).append(str(place))

    def all(self) -> dict[str, list[str]]:
        return self.of_images | self.of_boxes


@dataclass
class Part:
    """How much a split has."""

    images: int = 0
    empty: int = 0
    objects: Counter[str] = field(default_factory=Counter)

    def add(self, names: Sequence[str]) -> None:
        """Count an image, by the classes of its objects."""
        self.images += 1
        self.empty += not names
        self.objects.update(names)


def part_of_coco(content: Mapping[str, Any]) -> Part:
    """Count what is in a file in COCO's format."""
    names = {row['id']: row['name'] for row in content['categories']}
    rows = content['annotations']
    ids = {row['image_id'] for row in rows}
    return Part(
        len(content['images']),
        len(content['images']) - len(ids),
        Counter(names[row['category_id']] for row in rows),
    )


def coco_config(root: Path, ann_file: str, images: str) -> dict[str, Any]:
    """The config of a data set in COCO's format.

    Args:
        root: What the other paths begin in.
        ann_file: The annotations.
        images: The folder that ``file_name`` begins in; '' for the root.
    """
    return dict(
        type='CocoDataset',
        data_root=f'{root}/',
        ann_file=ann_file,
        data_prefix=dict(img=f'{images}/' if images else ''),
    )


def coco_metric(ann_file: Path) -> dict[str, Any]:
    return dict(type='CocoMetric', metric='bbox', ann_file=str(ann_file))


def summarise(
    layout: str,
    parts: Mapping[str, Part],
    classes: Sequence[str],
    *,
    faults: Faults | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> tuple[str, ...]:
    """Return the five lines that say what was understood.

    Args:
        layout: The name of the layout, and where it was found.
        parts: What each split has.
        classes: The names in their order.
        faults: What was left out.
        notes: What else is to be said, for each line by its first word.
    """
    faults, notes = faults or Faults(), notes or {}
    objects = sum((part.objects for part in parts.values()), Counter())
    empty = sum(part.empty for part in parts.values())
    images = f'{sum(part.images for part in parts.values()):,}'
    lines = dict(
        layout=[layout],
        images=[images + (f', {empty:,} without objects' if empty else '')],
        boxes=[f'{objects.total():,}'],
        classes=[f'{len(classes)}: {_named(classes, objects)}'],
        splits=[
            f'{split} {part.images:,} images, {part.objects.total():,} boxes'
            for split, part in parts.items()
        ],
    )
    none = [name for name in classes if not objects[name]]
    if none:
        more = f' and {len(none) - NAMED} more' if len(none) > NAMED else ''
        lines['classes'].append(
            f'without boxes: {", ".join(none[:NAMED])}' + more
        )
    for word, kinds in (
        ('images', faults.of_images),
        ('boxes', faults.of_boxes),
    ):
        if kinds:
            left = (f'{kind} ({len(at):,})' for kind, at in kinds.items())
            lines[word].append(f'left out: {", ".join(left)}')
    for word, texts in notes.items():
        lines[word] += texts
    return tuple(f'{f"{w}:":8} {"; ".join(t)}' for w, t in lines.items())


def _named(classes: Sequence[str], objects: Counter[str]) -> str:
    named = [f'{n} {objects[n]:,}' for n in classes if objects[n]]
    more = len(named) - NAMED
    text = ', '.join(named[:NAMED])
    return text + (f' and {more} more' if more > 0 else '')
