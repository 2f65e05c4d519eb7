"""Write VOC annotations as COCO's."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import VOC_REMEDY
from .files import StrPath
from .voc import Box, VocImage, VocObject, read_voc_image, read_voc_split


@dataclass
class Conversion:
    """COCO annotations, and what could not be taken over as it was."""

    coco: dict[str, list[dict[str, Any]]]
    clipped: list[str] = field(default_factory=list)
    """Boxes that left their image: name of the image, class, box."""
    dropped: list[str] = field(default_factory=list)
    """Boxes without area inside of their image, told likewise."""


def voc_to_coco(
    sources: Sequence[tuple[StrPath, str]],
    classes: Sequence[str],
    *,
    one_based: bool = False,
    relative_to: StrPath | None = None,
    remedy: str = VOC_REMEDY,
) -> Conversion:
    """Convert splits in the layout of Pascal VOC to COCO annotations.

    Boxes become ``[x, y, width, height]``, clipped to the image; those
    without area are dropped, and both are told. Ids count from 1 in the
    order of the lists (the COCO evaluation takes an annotation of id 0 for
    unmatched), categories in the order of ``classes``. An object marked
    ``difficult`` becomes ``iscrowd=1``: neither learnt nor counted.

    Args:
        sources: Folders and their splits (see :func:`voc_check`), joined
            into one set.
        classes: The classes, in order.
        one_based: Whether coordinates are indices of pixels that count from
            1, the last inside of the box, as in Pascal VOC itself:
            ``width = xmax - xmin + 1``. Most labelling tools write plain
            coordinates in the same XML: ``width = xmax - xmin``.
        relative_to: Folder that each ``file_name`` is relative to; ``None``
            for the file's own name.
        remedy: Last sentence of every error.

    Raises:
        DataError: As in :func:`voc_check`.
    """
    ids = {name: number for number, name in enumerate(classes, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    done = Conversion(
        {
            'images': images,
            'annotations': annotations,
            'categories': coco_categories(classes),
        }
    )
    for root, split in ((Path(root), split) for root, split in sources):
        for name in read_voc_split(root, split, remedy):
            image = read_voc_image(root, name, classes, remedy)
            file = root / 'JPEGImages' / f'{name}.jpg'
            if relative_to is None:
                file_name = file.name
            else:
                file_name = file.relative_to(relative_to).as_posix()
            images.append(coco_image(len(images) + 1, file_name, image))
            for item in image.objects:
                box = _convert_box(name, item, image, one_based, done)
                if box is not None:
                    annotations.append(
                        coco_annotation(
                            len(annotations) + 1,
                            len(images),
                            ids[item.name],
                            box,
                            item.difficult,
                        )
                    )
    return done


def _convert_box(
    name: str,
    item: VocObject,
    image: VocImage,
    one_based: bool,
    done: Conversion,
) -> Box | None:
    x0, y0, x1, y1 = item.box
    box = (x0 - 1, y0 - 1, x1, y1) if one_based else item.box
    clipped = clip_box(box, (0, 0, image.width, image.height))
    note = f'{name} {item.name} {" ".join(f"{v:g}" for v in item.box)}'
    if clipped is None:
        done.dropped.append(note)
    elif clipped != box:
        done.clipped.append(note)
    return clipped


def clip_box(box: Box, region: Box) -> Box | None:
    """The part of a box inside of a region; ``None`` if it has no area."""
    x0, y0 = max(box[0], region[0]), max(box[1], region[1])
    x1, y1 = min(box[2], region[2]), min(box[3], region[3])
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def coco_categories(classes: Sequence[str]) -> list[dict[str, Any]]:
    """The list of ``categories``, with ids from 1."""
    return [
        {'id': number, 'name': name}
        for number, name in enumerate(classes, start=1)
    ]


def coco_image(number: int, file_name: str, size: VocImage) -> dict[str, Any]:
    """One entry of ``images``."""
    return {
        'id': number,
        'file_name': file_name,
        'width': size.width,
        'height': size.height,
    }


def coco_annotation(
    number: int, image: int, category: int, box: Box, crowd: bool = False
) -> dict[str, Any]:
    """One entry of ``annotations``; whole numbers are written as such."""
    x0, y0, x1, y1 = (int(v) if v == int(v) else v for v in box)
    width, height = x1 - x0, y1 - y0
    return {
        'id': number,
        'image_id': image,
        'category_id': category,
        'bbox': [x0, y0, width, height],
        'area': width * height,
        'iscrowd': int(crowd),
    }
