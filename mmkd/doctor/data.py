"""The data of a run: what is in it, and what is lost of it in silence.

All annotations are read from their files, and all files of images are looked
for. The headers of nearly all are read, and a sample of them is decoded.
"""

import os.path as osp
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mmengine.config import Config

from .annotations import Part, parts_of, read_part, worst
from .boxes import check_boxes, check_names, check_order, resize_factors
from .faults import Faults, counted
from .photos import (
    check_copies,
    check_missing,
    check_photos,
    choose,
    find_copies,
    list_files,
    loader_of,
    open_files,
)
from .report import Report, some, table

SECTION = 'Data'
SPLITS = ('train', 'val', 'test')
FOLDED = 12
"""Of more classes, only the most and the least frequent ones are shown."""
FEW_IMAGES = 100
FEW_BOXES = 10
SHARE = 0.95
"""A class with more of the boxes leaves nothing to the others."""


def check_data(
    cfg: Mapping[str, Any], report: Report, sample: int | None = None
) -> None:
    """Examine the data sets of a config.

    Args:
        cfg: A config with ``train_dataloader`` and its like.
        report: Where it is said.
        sample: How many images are decoded; -1 for all, and None for as many
            as take some seconds.
    """
    faults = Faults()
    parts = _read(cfg, report, faults)
    files = list_files(parts)
    find_copies(files)
    loader = loader_of(parts)
    decoded, headers = choose(
        files, len(files.sizes) if sample == -1 else sample
    )
    open_files(files, decoded, headers, loader)
    usable = []
    missing: set[str] = set()
    for part in parts:
        check_missing(part, files, faults)
        wrong = check_photos(part, files, loader, faults)
        missing |= check_names(part, faults)
        usable.append(check_boxes(part, faults, wrong))
        _check_images(part, usable[-1], faults)
    check_order(parts, faults)
    check_copies(parts, files, faults)
    _check_amounts(parts, usable, faults)
    _check_classes(parts, usable, missing, report, faults)
    _check_evaluators(cfg, parts, faults)
    _describe(parts, usable, report)
    if files.sizes:
        report.say(SECTION, _opened(decoded, headers, len(files.sizes)))
    faults.report(report)


def _read(
    cfg: Mapping[str, Any], report: Report, faults: Faults
) -> list[Part]:
    """Read the annotations of all splits that the config has."""
    parts: list[Part] = []
    before: list[Any] = []
    for split in SPLITS:
        loader = cfg.get(f'{split}_dataloader') or {}
        dataset = loader.get('dataset')
        if not isinstance(dataset, Mapping):
            continue
        if split == 'test' and dataset in before:
            report.say(SECTION, 'test: the same as val', '')
            continue
        before.append(dataset)
        for each, pipeline in parts_of(dataset):
            part = read_part(split, each, pipeline, faults)
            if part is not None:
                parts.append(part)
    return parts


def _opened(decoded: Sequence[str], headers: Sequence[str], total: int) -> str:
    if len(decoded) == total:
        return f'all {counted(total, "image")} decoded'
    return (
        f'{len(decoded):,} of {counted(total, "image")} decoded, only the '
        f'header and the end of {len(headers):,} others read (--data-sample '
        'all decodes every one)'
    )


# --------------------------------------------------------------------- amounts


def _check_images(part: Part, usable: np.ndarray, faults: Faults) -> None:
    """Report images that training leaves out in silence."""
    options = part.options.get('filter_cfg') or {}
    if not part.trains or not part.pictures:
        return
    least = options.get('min_size', 0)
    with np.errstate(invalid='ignore'):
        small = np.flatnonzero(part.sizes.min(axis=1) < least)
    faults.add(
        part.split,
        faults.share(len(small), len(part.pictures)),
        'image',
        f'smaller than min_size={least}, which {part.options["type"]} leaves '
        'out',
        len(small),
        [part.places[i] for i in small[:3]],
    )
    empty = len(part.pictures) - len(np.unique(part.image))
    if not empty:
        return
    filters = options.get('filter_empty_gt', False)
    faults.say(
        f'{part.split}: {counted(empty, "image")} without boxes, '
        + (
            'left out of training (filter_empty_gt=True).'
            if filters
            else 'trained as background (filter_empty_gt=False).'
        ),
        'notes',
    )


def _check_amounts(
    parts: Sequence[Part], usable: Sequence[np.ndarray], faults: Faults
) -> None:
    """Report splits without images, without boxes, or with very few."""
    for split in dict.fromkeys(part.split for part in parts):
        mine = [p for p in parts if p.split == split]
        images = sum(len(p.pictures) for p in mine)
        boxes = sum(len(p.boxes) for p in mine)
        left = sum(
            int(u.sum())
            for p, u in zip(parts, usable, strict=True)
            if p.split == split
        )
        files = some([p.file for p in mine])
        if not images:
            faults.say(f'{split}: {files} has no image.', worst(split))
        elif not boxes and any(p.annotated for p in mine):
            faults.say(
                f'{split}: none of its {counted(images, "image")} has a box '
                f'({files}).',
                'stops' if split == 'train' else 'warns',
            )
        elif boxes and not left and not faults.worst(split):
            crowd = sum(int(p.crowd.sum()) for p in mine)
            why = f': {crowd:,} are crowds or difficult' if crowd else ''
            faults.say(
                f'{split}: none of its {counted(boxes, "box")} can be used'
                f'{why} ({files}).',
                'stops' if split == 'train' else 'warns',
            )
        elif split == 'train' and images < FEW_IMAGES:
            text = f'train: only {counted(images, "image")}'
            faults.say(f'{text}.', 'notes')


def class_counts(
    parts: Sequence[Part], usable: Sequence[np.ndarray], split: str
) -> dict[str, tuple[int, int]]:
    """Return the usable boxes of each class, and the images with one."""
    counts: dict[str, tuple[int, int]] = {}
    for part, left in zip(parts, usable, strict=True):
        if part.split != split:
            continue
        labels, images = part.labels()[left], part.image[left]
        size = len(part.classes)
        boxes = np.bincount(labels, minlength=size)
        pairs = np.unique(labels + size * images) % max(size, 1)
        pictures = np.bincount(pairs, minlength=size)
        for name, *more in zip(part.classes, boxes, pictures, strict=True):
            had = counts.get(name, (0, 0))
            counts[name] = (had[0] + int(more[0]), had[1] + int(more[1]))
    return counts


def _check_classes(
    parts: Sequence[Part],
    usable: Sequence[np.ndarray],
    explained: set[str],
    report: Report,
    faults: Faults,
) -> None:
    """Report classes without boxes, with few, and one with nearly all."""
    for split in ('train', 'val'):
        counts = class_counts(parts, usable, split)
        amounts = {name: boxes for name, (boxes, _) in counts.items()}
        total = sum(amounts.values())
        if not total or faults.worst(split):
            continue
        empty = [n for n, c in amounts.items() if not c and n not in explained]
        present = [c for c in amounts.values() if c]
        # Of many classes in few images, some have none by chance.
        chance = 2 * len(empty) > len(amounts) or min(present) < 5
        faults.add(
            split,
            'notes' if chance else 'warns',
            'class',
            'without a box'
            + (', so never learnt' * (split == 'train'))
            + (', so never measured' * (split == 'val')),
            len(empty),
            empty,
        )
        if split == 'val':
            continue
        few = [n for n, c in amounts.items() if 0 < c < FEW_BOXES]
        faults.add(
            split, 'notes', 'class', f'with fewer than {FEW_BOXES} boxes',
            len(few), few,
        )  # fmt: skip
        first = max(amounts, key=lambda name: amounts[name])
        if len(present) > 1 and amounts[first] > SHARE * total:
            share = amounts[first] / total
            text = f'"{first}" has {share:.0%} of all {total:,} boxes'
            faults.say(f'{split}: {text}.', 'notes')


def _check_evaluators(
    cfg: Mapping[str, Any], parts: Sequence[Part], faults: Faults
) -> None:
    """The metric has to read the annotations of the images it measures."""
    for split in ('val', 'test'):
        files = {osp.realpath(p.file) for p in parts if p.split == split}
        evaluators = cfg.get(f'{split}_evaluator') or ()
        if isinstance(evaluators, Mapping):
            evaluators = [evaluators]
        for each in evaluators if files else ():
            path = each.get('ann_file')
            if not path or osp.realpath(path) in files:
                continue
            lost = not osp.exists(path)
            faults.say(
                f'{split}: {split}_evaluator reads {path}, '
                + ('which does not exist' if lost else 'another file than')
                + f'{"; the data set reads" if lost else ""} '
                f'{some([p.file for p in parts if p.split == split])}'
                f'{"" if lost else ", which the data set reads"}. Give both '
                'the same ann_file.',
                'stops' if lost and split == 'val' else 'warns',
            )


# ----------------------------------------------------------------- description


def _describe(
    parts: Sequence[Part], usable: Sequence[np.ndarray], report: Report
) -> None:
    """Say what is in each split, in each class, and how large boxes are."""
    splits = [s for s in SPLITS if any(p.split == s for p in parts)]
    if not splits:
        return
    rows = [['split', 'images', 'with boxes', 'boxes', 'usable', 'side']]
    values: dict[str, Any] = {}
    counts = {split: class_counts(parts, usable, split) for split in splits}
    for split in splits:
        mine = [
            (p, u)
            for p, u in zip(parts, usable, strict=True)
            if p.split == split
        ]
        numbers = (
            sum(len(p.pictures) for p, _ in mine),
            sum(len(np.unique(p.image)) for p, _ in mine),
            sum(len(p.boxes) for p, _ in mine),
            sum(int(u.sum()) for _, u in mine),
        )
        names = ('images', 'with_boxes', 'boxes', 'usable')
        values[split] = dict(zip(names, numbers, strict=True))
        values[split]['classes'] = counts[split]
        sides = np.concatenate([_sides(p)[u] for p, u in mine])
        cells = [f'{number:,}' for number in numbers]
        rows.append([split, *cells, _spread(sides)])
    report.values['data'] = values
    report.say(SECTION, *table(rows), '')
    report.say(SECTION, *_class_lines(counts))
    for part, left in zip(parts, usable, strict=True):
        factors = resize_factors(part) if part.split == 'train' else None
        if factors is not None and left.any():
            sides = _sides(part, factors)[left]
            text = f'side after the resize in training: {_spread(sides)}'
            report.say(SECTION, text)
            break
    report.say(
        SECTION,
        'usable: learnt from or measured; side: √area in pixels, from the '
        'smallest 5 % over the median to the largest 5 %',
    )


def _sides(part: Part, factors: np.ndarray | None = None) -> np.ndarray:
    """Return the square root of each box's area."""
    size = part.boxes[:, 2:] - part.boxes[:, :2]
    if factors is not None:
        size = size * factors[part.image]
    return np.sqrt(np.maximum(size.prod(axis=1), 0))


def _spread(sides: np.ndarray) -> str:
    sides = sides[np.isfinite(sides)]
    if not len(sides):
        return '-'
    low, middle, high = np.percentile(sides, (5, 50, 95))
    return f'{low:.0f} - {middle:.0f} - {high:.0f}'


def _class_lines(
    counts: Mapping[str, Mapping[str, tuple[int, int]]],
) -> list[str]:
    """Return the table of classes, folded where there are many."""
    first = next(iter(counts.values()))
    names = sorted(first, key=lambda name: -first[name][0])
    present = [name for name in names if first[name][0]]
    rows = [['boxes (images) of', *counts]]
    shown = names
    if len(names) > FOLDED:
        half = FOLDED // 2
        shown = present
        if len(present) > FOLDED:
            shown = [*present[:half], '…', *present[-half:]]
    for name in shown:
        cells = [
            '{:,} ({:,})'.format(*of[name]) if name in of else ''
            for of in counts.values()
        ]
        rows.append([name, *cells])
    lines = table(rows)
    if len(names) > FOLDED and len(present) < len(names):
        empty = names[len(present) :]
        split = next(iter(counts))
        text = f'{counted(len(empty), "class")} of {len(names):,} without a'
        lines.append(f'{text} box in {split}: {some(empty, 8)}')
    if len(present) > 1:
        most, least = first[present[0]][0], first[present[-1]][0]
        lines.append(
            f'imbalance: {most / least:.3g} : 1, {present[0]} to {present[-1]}'
        )
    return lines


# --------------------------------------------------------------------- folders


def data_config(data: Any) -> Config:
    """Return a config with the data that were found in a folder."""
    metainfo = dict(classes=data.classes)
    kept = dict(filter_empty_gt=True, min_size=1)
    splits = {
        'train': data.train,
        'val': data.val,
        'test': data.test,
    }
    cfg = {
        f'{split}_dataloader': dict(
            dataset=dict(dataset, metainfo=metainfo)
            | (
                dict(filter_cfg=kept)
                if split == 'train'
                else dict(test_mode=True)
            )
        )
        for split, dataset in splits.items()
        if dataset
    }
    return Config(cfg)


def say_found(data: Any, report: Report) -> None:
    """Say what was understood of a folder, and what was left out of it."""
    if summary := data.summary:
        report.say(SECTION, *summary, '')
    for fault, places in data.faults.items():
        report.find(
            f'{fault}, left out when the folder was read '
            f'({len(places):,}): {some(places)}.',
            'warns',
        )
