"""Write what was read as annotations in COCO's format, and keep the split.

The annotations are all that is written. Where the images are, how the data
were read and how they were split stands in their ``info``, so that the next
conversion leaves each image in its split.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.errors import DataError

from ..coco import CocoAnnotations
from ..errors import data_error, some
from ..files import read_json, write_json
from .coco import origin_of
from .data import (
    SPLITS,
    Data,
    coco_config,
    coco_metric,
    part_of_coco,
    summarise,
)
from .reading import Picture, Reading
from .splits import FRACTIONS, split_images

ROOT = Path('data')
"""Where converted data are kept, below the current folder."""
OWN = ('coco', 'VOCdevkit', 'bccd', 'neon', 'downloads')
"""Names below it that ``mmkd prepare`` uses."""


@dataclass(frozen=True)
class Options:
    """What a user asks for; None for what was asked for last time."""

    fractions: tuple[float, ...] | None = None
    seed: int | None = None
    classes: tuple[str, ...] | None = None


def folder_for(source: Path, root: Path) -> Path:
    """Return the folder for the conversion of a data set.

    Args:
        source: The path that the user has given.
        root: The folder of the data set, which is never written to.
    """
    name = source.stem if source.is_file() else source.name
    for number in range(1, 1000):
        end = '' if number == 1 else '_coco' + str(number) * (number > 2)
        folder = Path(os.path.abspath(ROOT / f'{name or "own"}{end}'))
        if folder.name in OWN or folder in (root, source, *root.parents):
            continue
        if not folder.exists() or kept_in(folder).get('source') == str(source):
            return folder
    raise data_error(
        ROOT, f'a free name for {name}', 'none', 'Give one: --out FOLDER.'
    )


def kept_in(folder: Path) -> dict[str, Any]:
    """What the last conversion has noted in a folder; {} if there is none."""
    for split in SPLITS:
        path = folder / 'annotations' / f'{split}.json'
        if path.is_file():
            try:
                content = read_json(path)
            except DataError:
                continue
            if isinstance(content, dict) and (found := origin_of(content)):
                return found
    return {}


def convert(
    reading: Reading, source: Path, out: Path, options: Options = Options()
) -> Data:
    """Split what was read, and write it.

    Args:
        reading: The images with their objects.
        source: The path that the user has given.
        out: The folder for the annotations.
        options: What the user asks for.

    Raises:
        DataError: If too little can be used, or the folder holds other data.
    """
    kept = kept_in(out)
    if kept.get('source', str(source)) != str(source):
        raise data_error(
            out,
            f'nothing, or the conversion of {source}',
            f'that of {kept["source"]}',
            'Give another folder with --out.',
        )
    paths = {s: out / 'annotations' / f'{s}.json' for s in SPLITS}
    if not kept and any(path.exists() for path in paths.values()):
        raise data_error(
            out,
            'a folder without annotations',
            'those of other data',
            'Give another folder with --out.',
        )
    classes = _choose(reading, options.classes or kept.get('classes'))
    _check(reading)
    rule = _split(reading, paths, kept, options)
    info: dict[str, Any] = dict(
        source=str(source), images=str(reading.root), layout=reading.layout
    )
    if rule:
        info['split'] = rule
    if options.classes or kept.get('classes'):
        info['classes'] = list(options.classes or kept['classes'])
    parts = {}
    pictures = sorted(reading.pictures.values(), key=lambda p: str(p.path))
    # The training's last: without it the others are no record of a split.
    for split in reversed(SPLITS):
        rows = [p for p in pictures if p.split == split]
        if not rows:
            paths[split].unlink(missing_ok=True)
            continue
        content = _content(rows, reading, classes)
        info_of = {'description': 'Converted by mmkd', 'mmkd': info}
        write_json(paths[split], {'info': info_of, **content})
        parts[split] = part_of_coco(content)
    parts = {split: parts[split] for split in SPLITS if split in parts}
    return _data(reading, out, classes, parts, rule)


# --------------------------------------------------------------------- checks


def _choose(reading: Reading, chosen: Sequence[str] | None) -> list[str]:
    """The classes in their order; objects of others are taken out."""
    if not chosen:
        if reading.numbered:
            reading.note(
                'classes',
                'numbered, as nothing names them; name '
                'them with `mmkd prepare own … --classes`',
            )
        return reading.classes
    if len(set(chosen)) != len(chosen):
        raise DataError(f'--classes names one twice: {some(chosen, 8)}.')
    if reading.numbered:
        number = {f'class_{i}': name for i, name in enumerate(chosen)}
        unnamed = [name for name in reading.classes if name not in number]
        if unnamed:
            raise data_error(
                '--classes',
                f'a name also for {some(unnamed)}',
                f'{len(chosen)}',
                'Name all classes in their order.',
            )
        for picture in reading.pictures.values():
            for item in picture.items:
                item.name = number[item.name]
        return list(chosen)
    unknown = [name for name in chosen if name not in reading.classes]
    if unknown:
        raise data_error(
            '--classes',
            f'some of {some(reading.classes, 20)}',
            some(unknown),
            'Correct the name.',
        )
    others = [name for name in reading.classes if name not in chosen]
    left = 0
    for picture in reading.pictures.values():
        items = [item for item in picture.items if item.name in chosen]
        left += len(picture.items) - len(items)
        picture.items = items
    if others:
        reading.note(
            'classes', f'not asked for: {some(others)} ({left} boxes)'
        )
    return list(chosen)


def _check(reading: Reading) -> None:
    """Refuse data of which hardly anything can be used."""
    pictures = reading.pictures.values()
    for what, kinds, good in (
        ('images', reading.faults.of_images, len(pictures)),
        (
            'boxes',
            reading.faults.of_boxes,
            sum(len(p.items) for p in pictures),
        ),
    ):
        bad = sum(map(len, kinds.values()))
        if bad > good:
            kind, places = max(kinds.items(), key=lambda item: len(item[1]))
            raise data_error(
                reading.root,
                f'{reading.layout}, most of whose {what} can be used',
                f'{good:,} that can and {bad:,} that cannot; of these '
                f'{kind} ({len(places):,}), such as {"; ".join(places[:2])}',
                'Mend them, or export the data again.',
            )
    labelled = sum(bool(picture.items) for picture in pictures)
    if labelled < 2:
        raise data_error(
            reading.root,
            'at least 2 images with boxes, to train and to validate on',
            f'{labelled} of {len(pictures):,} images ({reading.layout})',
            'Label more images.',
        )


# ---------------------------------------------------------------------- split


def _split(
    reading: Reading,
    paths: dict[str, Path],
    kept: dict[str, Any],
    options: Options,
) -> dict[str, Any] | None:
    """Give each image a split, and return by which rule, if not its own."""
    splits = {picture.split for picture in reading.pictures.values()}
    asked = options.fractions is not None
    if {'train', 'val'} <= splits and not asked:
        rest = [p for p in reading.pictures.values() if not p.split]
        for picture in rest:
            reading.faults.image(
                'images of no split', reading.short(picture.path)
            )
            del reading.pictures[str(picture.path), '']
        if options.seed is not None:
            reading.note('splits', 'those of the data: --seed is for --split')
        return None
    last = kept.get('split') or {}
    fractions = list(options.fractions or last.get('fractions') or FRACTIONS)
    seed = options.seed if options.seed is not None else last.get('seed', 0)
    rule = dict(seed=seed, fractions=fractions)
    # What is for testing alone stays so, unless fractions are asked for.
    held = {'test'} & splits if not asked and splits != {'test'} else set()
    free: dict[str, Picture] = {}
    for key, picture in list(reading.pictures.items()):
        if picture.split not in held:
            name = _name(picture.path, reading.root)
            if name in free:
                del reading.pictures[key]  # it was in two splits
            else:
                free[name] = picture
    images = {
        name: frozenset(item.name for item in picture.items)
        for name, picture in free.items()
    }
    fixed = _kept_splits(paths) if rule == last else {}
    if fixed:
        new = len(images.keys() - fixed.keys())
        reading.note(
            'splits',
            f'kept from the last time, {new} new images'
            if new
            else 'kept from the last time',
        )
    made = split_images(images, fractions, seed, fixed)
    for name, picture in free.items():
        picture.split = made[name]
    reading.pictures = {
        (str(p.path), p.split): p for p in reading.pictures.values()
    }
    shares = ' : '.join(f'{100 * each:g}' for each in fractions)
    reading.note('splits', f'split {shares} by class with seed {seed}')
    return rule


def _kept_splits(paths: dict[str, Path]) -> dict[str, str]:
    """The split of each image in files of an earlier conversion."""
    if not paths['train'].is_file():
        return {}
    found: dict[str, str] = {}
    for split, path in paths.items():
        if path.is_file():
            rows = read_json(path).get('images', [])
            found |= {row['file_name']: split for row in rows}
    return found


# -------------------------------------------------------------------- writing


def _name(path: Path, root: Path) -> str:
    inside = path.is_relative_to(root)
    return (path.relative_to(root) if inside else path).as_posix()


def _content(
    pictures: Sequence[Picture], reading: Reading, classes: Sequence[str]
) -> dict[str, Any]:
    done = CocoAnnotations(classes)
    for picture in pictures:
        name = _name(picture.path, reading.root)
        done.add_image(name, picture.width, picture.height)
        for item in picture.items:
            done.add_object(
                item.name,
                [_tidy(value) for value in item.box],
                area=_tidy(
                    abs(item.box[2] * item.box[3])
                    if item.area is None
                    else item.area
                ),
                crowd=item.crowd,
                outline=item.outline,
            )
    return done.content


def _tidy(value: float) -> float:
    """Drop what is below a ten-thousandth of a pixel."""
    value = round(value, 4)
    return int(value) if value == math.floor(value) else value


def _data(
    reading: Reading,
    out: Path,
    classes: Sequence[str],
    parts: dict[str, Any],
    rule: dict[str, Any] | None,
) -> Data:
    data = {
        split: coco_config(
            out, f'annotations/{split}.json', reading.root.as_posix()
        )
        for split in parts
    }
    shown = (
        Path(os.path.relpath(out)) if out.is_relative_to(Path.cwd()) else (out)
    )
    layout = f"{reading.layout} in {reading.root}; annotations in COCO's "
    layout += f'format: {shown}'
    return Data(
        tuple(classes),
        data['train'],
        data['val'],
        coco_metric(out / 'annotations' / 'val.json'),
        tuple(reading.groups),
        data.get('test'),
        summarise(
            layout,
            parts,
            classes,
            faults=reading.faults,
            notes=reading.notes,
        ),
        reading.faults.all(),
        parts['train'].images,
    )
