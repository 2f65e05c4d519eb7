"""What is wrong with boxes and classes, in bulk."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmkd.data.class_names import match_names

from .annotations import Part
from .faults import SHOWN, Faults, counted
from .report import some

SHAPES = 2000
"""Of so many annotations the outline is compared with the box."""
ROUNDING = 1.5
"""Pixels by which a box may reach out of its image: labelling tools round,
and count from 0 or 1."""
ENOUGH = 100
"""Boxes from which on their distribution says something."""
TINY = 16
"""Square pixels after the resize, below which a box teaches little."""
POINT = 'of a single point, perhaps a stray click'
FILTERED = 'smaller than'
BACKGROUND = {'background', '__background__', '_background_', 'bg'}


def steps(pipeline: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the transforms of a pipeline, those within others too."""
    for step in pipeline if isinstance(pipeline, list | tuple) else ():
        if isinstance(step, list | tuple):
            yield from steps(step)
        elif isinstance(step, Mapping):
            yield step
            yield from steps(step.get('transforms'))


def kind(step: Mapping[str, Any]) -> str:
    """Return the name of a transform's class, without its scope."""
    name = step.get('type', '')
    name = name if isinstance(name, str) else getattr(name, '__name__', '')
    return str(name).rpartition('.')[2]


def resize_factors(part: Part) -> np.ndarray | None:
    """Return by what the pipeline multiplies x and y, (images, 2)."""
    for step in steps(part.pipeline):
        if 'Resize' not in kind(step):
            continue
        scale = step.get('scale') or step.get('scales')
        if not isinstance(scale, list | tuple) or not len(scale):
            continue
        if isinstance(scale[0], list | tuple):
            scale = scale[len(scale) // 2]
        if len(scale) != 2 or not min(scale) > 0:
            continue
        target = np.array(scale, float)
        with np.errstate(divide='ignore', invalid='ignore'):
            if kind(step) == 'Resize' and not step.get('keep_ratio'):
                return np.asarray(target / part.sizes)
            longest, shortest = part.sizes.max(1), part.sizes.min(1)
            factor = np.minimum(max(scale) / longest, min(scale) / shortest)
        return np.repeat(factor[:, None], 2, axis=1)
    return None


def smallest(part: Part) -> tuple[np.ndarray, str]:
    """Return the least width and height that ``FilterAnnotations`` keeps.

    They are in pixels of the image, (images, 2), with the filter's name.
    """
    least = np.zeros_like(part.sizes)
    resized = False
    for step in steps(part.pipeline):
        resized |= 'Resize' in kind(step)
        if kind(step) == 'FilterAnnotations' and step.get('by_box', True):
            limit = step.get('min_gt_bbox_wh', (1, 1))
            factors = resize_factors(part) if resized else None
            limits = np.array(limit, float)
            least = limits if factors is None else limits / factors
            least = np.nan_to_num(np.broadcast_to(least, part.sizes.shape))
            return least, f'FilterAnnotations, min_gt_bbox_wh={limit}'
    return least, ''


def check_boxes(
    part: Part, faults: Faults, skip: set[int] | None = None
) -> np.ndarray:
    """Report the boxes that teach nothing, and why.

    Args:
        part: The data set.
        faults: Where they are reported.
        skip: Images whose size is known to be wrong, so that nothing is said
            of where their boxes lie.

    Returns:
        (boxes,), whether a box is learnt from.
    """
    total = len(part.boxes)
    if not total:
        return np.zeros(0, bool)
    left = part.labels() >= 0
    learnt = ~part.crowd & ~part.ignored
    fits = ~np.isin(part.image, sorted(skip or ()))
    fits &= (part.sizes[part.image] > 0).all(axis=1)
    layout = _layout(part, fits & left)
    if layout:
        faults.say(f'{part.split}: {layout}', 'stops')
        return np.zeros(total, bool)
    with np.errstate(invalid='ignore'):
        for mask, what in _losses(part, fits):
            lost = np.flatnonzero(mask & left)
            left[lost] = False
            severity = faults.share(len(lost), total)
            if len(lost) < total * _tolerated(what):
                severity = 'notes'
            faults.add(
                part.split,
                severity,
                'box',
                what,
                len(lost),
                [part.box(i) for i in lost[:SHOWN]],
            )
        reach = part.boxes[:, 2:] > part.sizes[part.image] + ROUNDING
        over = (reach | (part.boxes[:, :2] < -ROUNDING)).any(axis=1)
    partly = np.flatnonzero(fits & left & over)
    faults.add(
        part.split,
        'notes',
        'box',
        'partly outside of its image',
        len(partly),
        [part.box(i) for i in partly[:SHOWN]],
    )
    usable = left & learnt
    _check_spread(part, fits & left, faults)
    _check_repeated(part, left, faults)
    _check_tiny(part, usable, faults)
    _check_fields(part, left, faults)
    _check_masks(part, usable, faults)
    return usable


def _tolerated(what: str) -> float:
    """Return the share of boxes whose loss is only noted."""
    if what.startswith(POINT):
        return 0.01  # nothing was marked
    # filters are chosen on purpose, up to a point
    return 0.25 if what.startswith(FILTERED) else 0.0


def _losses(part: Part, fits: np.ndarray) -> Iterator[tuple[Any, str]]:
    """Yield for each reason which boxes it makes useless, (boxes,)."""
    coco = part.layout == 'COCO'
    drops = ', dropped by CocoDataset' if coco else ', of no use'
    low, high = part.boxes[:, :2], part.boxes[:, 2:]
    limit = part.sizes[part.image]
    size = high - low
    finite = np.isfinite(part.written).all(axis=1)
    yield ~finite, 'with NaN or infinity as a coordinate'
    unit = (np.abs(part.written) <= 1).all(axis=1)
    unit &= (part.written % 1 != 0).any(axis=1)
    yield unit, f'normalised to 0..1 instead of in pixels{drops}'
    yield (size == 0).all(axis=1), f'{POINT}{drops}'
    yield (
        (size <= 0).any(axis=1),
        f'with a width or height of 0 or less{drops}',
    )
    outside = ((low >= limit) | (high <= 0)).any(axis=1)
    yield fits & outside, f'wholly outside of its image{drops}'
    if coco:
        blank = ~(limit > 0).all(axis=1)
        yield blank, f'in an image without a size{drops}'
        yield (size < 1).any(axis=1), f'of less than a pixel{drops}'
    if part.areas is not None:
        yield part.areas <= 0, f'with an "area" of 0 or less{drops}'
    least = (part.options.get('filter_cfg') or {}).get('bbox_min_size')
    if least and not coco:
        small = (size < least).any(axis=1)
        yield small, f'{FILTERED} bbox_min_size={least}: ignored'
    limits, name = smallest(part)
    small = (size <= limits[part.image]).any(axis=1) & part.trains
    yield small, f'{FILTERED} the pipeline keeps ({name})'


def _layout(part: Part, chosen: np.ndarray) -> str:
    """Say that most boxes only make sense in another layout, if so."""
    chosen = chosen & np.isfinite(part.written).all(axis=1)
    boxes = part.written[chosen]
    size = part.sizes[part.image[chosen]]
    if len(boxes) < 4:
        return ''
    most = 0.98
    a, b = boxes[:, :2], boxes[:, 2:]

    def inside(low: np.ndarray, high: np.ndarray, limit: Any = size) -> float:
        good = (low >= -ROUNDING) & (high <= limit + ROUNDING) & (high > low)
        return float(good.all(axis=1).mean())

    coco = part.layout == 'COCO'
    low, high = (a, a + b) if coco else (a, b)
    count = counted(len(boxes), 'box')
    wrong = 1 - inside(low, high)
    if wrong >= 0.25 and coco and inside(a, b) >= most:
        return (
            f'the boxes seem to be (x0, y0, x1, y1) and not (x, y, width, '
            f'height): {wrong:.0%} of {count} reach out of their image as '
            f'the latter, and all fit as the former: {_first(part, chosen)}.'
        )
    if wrong >= 0.25 and not coco and inside(a, a + b) >= most:
        return (
            f'the boxes seem to be (x, y, width, height) and not (xmin, ymin, '
            f'xmax, ymax): {wrong:.0%} of {count} are none as the latter, and '
            f'all fit as the former: {_first(part, chosen)}.'
        )
    below = (high > size + ROUNDING).any(axis=1).mean()
    above = (low < -ROUNDING).any(axis=1).mean()
    centred = coco and below >= 0.05 and not above
    if centred and inside(a - b / 2, a + b / 2) >= most and len(boxes) >= 20:
        return (
            f'the boxes seem to be (centre x, centre y, width, height) and '
            f'not (x, y, width, height): {below:.0%} of {count} reach out of '
            f'their image on the right or below, none on the left or above: '
            f'{_first(part, chosen)}.'
        )
    swapped = size[:, ::-1]
    if wrong >= 0.05 and inside(low, high, swapped) >= most:
        return (
            f'x and y seem to be swapped: {wrong:.0%} of {count} reach out of '
            f'their image, and all fit with x and y swapped: '
            f'{_first(part, chosen)}.'
        )
    return ''


def _first(part: Part, chosen: np.ndarray) -> str:
    return part.box(int(np.flatnonzero(chosen)[0]))


def _check_spread(part: Part, chosen: np.ndarray, faults: Faults) -> None:
    """Find boxes of images that were resized after they were labelled."""
    if chosen.sum() < ENOUGH or len(np.unique(part.image[chosen])) < 20:
        return
    reach = part.boxes[chosen, 2:] / part.sizes[part.image[chosen]]
    far = reach.max(axis=0)
    if (far < 0.75).all():
        percent = part.boxes[chosen, 2:].max() <= 100
        faults.say(
            f'{part.split}: no box lies in the right or lower part of an '
            f'image: {chosen.sum():,} boxes end at {far[0]:.0%} of the width '
            f'and {far[1]:.0%} of the height. '
            + (
                'Are they in per cent?'
                if percent
                else 'Were the images enlarged after they were labelled?'
            ),
            'warns',
        )


def _check_repeated(part: Part, chosen: np.ndarray, faults: Faults) -> None:
    index = np.flatnonzero(chosen & ~part.crowd)
    columns = [
        part.image,
        part.category,
        *np.ascontiguousarray(part.written.T),
    ]
    key: Any = np.zeros(len(index), np.uint64)
    for number, column in enumerate(columns):
        bits = np.ascontiguousarray(column[index], float).view(np.uint64)
        key = (key ^ bits) * np.uint64(0x9E3779B97F4A7C15 + 2 * number)
        key = key ^ (key >> np.uint64(29))
    first = np.unique(key, return_index=True)[1]
    again = np.setdiff1d(index, index[first])
    # A rare copy costs next to nothing; COCO itself has some.
    common = len(again) * 100 >= len(index)
    faults.add(
        part.split,
        'warns' if common else 'notes',
        'box',
        'twice in its image: in evaluation, one of the two counts as missed',
        len(again),
        [part.box(i) for i in again[:SHOWN]],
    )


def _check_tiny(part: Part, usable: np.ndarray, faults: Faults) -> None:
    factors = resize_factors(part)
    if factors is None or not part.trains:
        return
    size = (part.boxes[:, 2:] - part.boxes[:, :2]) * factors[part.image]
    with np.errstate(invalid='ignore'):
        tiny = np.flatnonzero(usable & (size.prod(axis=1) < TINY))
    faults.add(
        part.split,
        'notes',
        'box',
        "of less than 4² pixels after the pipeline's resize",
        len(tiny),
        [part.box(i) for i in tiny[:SHOWN]],
    )


def _check_fields(part: Part, chosen: np.ndarray, faults: Faults) -> None:
    """Compare a box with its area and its outline."""
    if part.areas is None:
        return
    size = part.boxes[:, 2:] - part.boxes[:, :2]
    with np.errstate(invalid='ignore'):
        large = part.areas > 1.1 * size.prod(axis=1) + 10
    index = np.flatnonzero(large & chosen)
    faults.add(
        part.split,
        'notes',
        'box',
        'whose "area" is larger than the box: objects count as large or small '
        'by it',
        len(index),
        [part.box(i) for i in index[:SHOWN]],
    )
    wrong = []
    for i in np.flatnonzero(chosen & ~part.crowd)[:SHAPES]:
        outline = part.rows[i].get('segmentation')
        if not outline or not isinstance(outline, list):
            continue
        try:
            points = np.concatenate([np.ravel(p) for p in outline])
            points = points.astype(float).reshape(-1, 2)
        except (TypeError, ValueError):
            wrong.append(i)
            continue
        ends = np.concatenate([points.min(axis=0), points.max(axis=0)])
        if np.abs(ends - part.boxes[i]).max() > 5 + 0.1 * size[i].max():
            wrong.append(i)
    faults.add(
        part.split,
        'notes',
        'box',
        'not enclosing its outline',
        len(wrong),
        [part.box(i) for i in wrong[:SHOWN]],
    )


def _check_masks(part: Part, usable: np.ndarray, faults: Faults) -> None:
    """Masks that are asked for have to be there."""
    loads = [s for s in steps(part.pipeline) if kind(s) == 'LoadAnnotations']
    if not any(step.get('with_mask') for step in loads):
        return
    index = np.flatnonzero(usable)
    if part.rows:
        index = np.array(
            [i for i in index if not part.rows[i].get('segmentation')], int
        )
    faults.add(
        part.split,
        'stops',
        'box',
        'without an outline ("segmentation"), which with_mask=True needs',
        len(index),
        [part.box(i) for i in index[:SHOWN]],
    )


# --------------------------------------------------------------------- classes


def check_names(part: Part, faults: Faults) -> set[str]:
    """Compare the classes of the config with those of the annotations.

    Returns:
        The classes of the config that the annotations do not name.
    """
    total = len(part.boxes)
    name = part.file.rpartition('/')[2]
    counts = np.bincount(
        part.category[part.category >= 0], minlength=len(part.categories)
    )
    lost = np.flatnonzero(part.category < 0)
    faults.add(
        part.split,
        faults.share(len(lost), total),
        'box',
        f'of no class: {name} has no category with their id',
        len(lost),
        [
            f'{part.box(i)} category_id {part.rows[i].get("category_id")!r}'
            for i in lost[:SHOWN]
        ],
        _shifted(part, lost),
    )
    ours, theirs = part.classes, part.categories
    missing = [n for n in ours if n not in theirs]
    unknown = {
        n: int(counts[i])
        for i, n in enumerate(theirs)
        if n not in ours and counts[i]
    }
    if part.layout == 'VOC' and total:
        missing = [n for n in missing if _partner(n, unknown)]
    boxes = sum(unknown.values())
    if unknown:
        _say_unknown(part, missing, unknown, boxes, total, faults)
    elif missing and part.layout == 'COCO':
        faults.add(
            part.split,
            'warns',
            'class',
            f'of the config that {name} does not have as a category, so that '
            'the labels of the classes after it are shifted',
            len(missing),
            missing,
            f'Its categories: {some(theirs, 10)}.',
        )
    background = [n for n in ours if n.casefold() in BACKGROUND]
    faults.add(
        part.split,
        'warns',
        'class',
        'for the background, which MMDetection adds by itself',
        len(background),
        background,
        'Take it out of the classes.',
    )
    return set(missing)


def _say_unknown(
    part: Part,
    missing: Sequence[str],
    unknown: Mapping[str, int],
    boxes: int,
    total: int,
    faults: Faults,
) -> None:
    matched = {n: _partner(n, part.classes) for n in unknown}
    places = [
        f'"{n}" ({counted(count, "box")}'
        + (f'; the config has "{matched[n]}")' if matched[n] else ')')
        for n, count in sorted(unknown.items(), key=lambda x: -x[1])
    ]
    severity = faults.share(boxes, total)
    # Fewer classes than the file has may be chosen on purpose.
    chosen = not any(matched.values()) and not missing
    if chosen and len(unknown) > len(part.classes):
        severity = 'notes'
    remedy = ''
    if severity != 'notes':
        remedy = f'The config has: {some(part.classes, 10)}.'
    faults.add(
        part.split,
        severity,
        'class',
        'in the annotations that the config does not have, so that '
        f'{boxes:,} of {counted(total, "box")} are dropped',
        len(unknown),
        places,
        remedy,
    )


def _partner(name: str, others: Any) -> str:
    """Return the other name that is most likely meant, or ''."""
    names = list(others)
    match = match_names([name], names)[name]
    if match:
        return match
    folded = {n.casefold().strip(): n for n in names}
    close = difflib.get_close_matches(
        name.casefold().strip(), list(folded), n=1, cutoff=0.8
    )
    return folded[close[0]] if close else ''


def _shifted(part: Part, lost: np.ndarray) -> str:
    """Recognise category ids that count from another number."""
    found = {part.rows[i].get('category_id') for i in lost.tolist()}
    if found == {0}:
        return 'Do the ids in the boxes count from 0, the categories from 1?'
    if all(isinstance(i, str) for i in found) and found:
        return 'Their ids are text, those of the categories numbers.'
    return ''


def check_order(parts: Sequence[Part], faults: Faults) -> None:
    """The same label has to mean the same class in every split."""
    chosen = [part for part in parts if part.order]
    for part in chosen[1:]:
        first = chosen[0]
        pairs = zip(part.order, first.order, strict=False)
        if any(a != b for a, b in pairs):
            a, b = (_differing(x.order, first.order, part.order)
                    for x in (first, part))  # fmt: skip
            faults.say(
                f'{part.split}: the same label is another class than in '
                f'{first.split}: {a} in {first.file}, {b} in {part.file}. '
                'MMDetection numbers the classes as the file lists its '
                'categories.',
                'stops',
            )
            return
    for part in chosen[:1]:
        if part.order != part.classes[: len(part.order)] and set(
            part.order
        ) == set(part.classes):
            faults.say(
                f'{part.split}: the classes have another order in the config '
                f'({some(part.classes)}) than in {part.file} '
                f'({some(part.order)}), which counts: pictures of predictions '
                'would show wrong names. Give them the order of the file.',
                'warns',
            )


def _differing(
    names: Sequence[str], one: Sequence[str], other: Sequence[str]
) -> str:
    """Show the first label that differs."""
    pairs = zip(one, other, strict=False)
    label = next(
        (i for i, (a, b) in enumerate(pairs) if a != b),
        min(len(one), len(other)),
    )
    name = f'"{names[label]}"' if label < len(names) else 'nothing'
    return f'{label} is {name}'
