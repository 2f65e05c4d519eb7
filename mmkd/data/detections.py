"""Read files of detections: COCO's results and annotations, tables of boxes.

All of them become a :class:`DetectionFile`. What cannot be meant is left out
and counted: boxes without area inside of their image, rows of a table that
cannot be read. What says that it is the wrong file is an error.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from .coco import check_coco_content, object_classes, problem_of
from .errors import data_error, some
from .files import StrPath, is_number, read_json, shown
from .layouts.listing import suffix_of
from .layouts.table import read_rows

REMEDY = 'Give the detections in pixels of the training images.'
OUTSIDE = 'boxes without area inside of their image'
CROWDS = 'crowds'
ROWS = 'rows that cannot be read'
TABLES = ('.csv', '.tsv')


@dataclass(slots=True)
class Boxed:
    """An image of the file, and the boxes on it.

    Attributes:
        name: The name of its file; None if only its id is known.
        size: Height and width, if they are known.
        boxes: Each xyxy in pixels of the image.
        scores: From 0 to 1.
        labels: Numbers in the classes of the file.
    """

    name: str | None = None
    size: tuple[int, int] | None = None
    boxes: list[tuple[float, ...]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


@dataclass
class DetectionFile:
    """What a file of detections holds.

    Attributes:
        classes: The names of its classes.
        images: The images by their ids, or by their names in a table.
        dropped: How many entries were left out, by what is wrong with them.
    """

    classes: tuple[str, ...]
    images: dict[Any, Boxed]
    dropped: Counter[str] = field(default_factory=Counter)

    def add(
        self, image: Boxed, label: int, corners: Sequence[float], score: float
    ) -> None:
        """Add a box, clipped to the image where its size is known."""
        left, top, right, bottom = corners
        if image.size is not None:
            height, width = image.size
            left, right = max(left, 0.0), min(right, width)
            top, bottom = max(top, 0.0), min(bottom, height)
        if not (left < right and top < bottom):
            self.dropped[OUTSIDE] += 1
            return
        image.boxes.append((left, top, right, bottom))
        image.scores.append(score)
        image.labels.append(label)


def read_detections(
    path: StrPath,
    annotations: StrPath | None = None,
    classes: Sequence[str] | Mapping[Any, str] | None = None,
) -> DetectionFile:
    """Read a file of detections.

    Args:
        path: A COCO result file (a list), a COCO annotation file, whose
            objects may have a ``score``, or a table of boxes (CSV).
        annotations: For a result file, the annotation file that names its
            images and categories.
        classes: For a result file without it, the name of each category id.
            For a table whose classes are numbers, their names in order.

    Raises:
        DataError: If the file cannot be read or is of another kind, names
            images or categories that ``annotations`` lacks, or has a score or
            a box that is none.
    """
    if suffix_of(str(path)) in TABLES:
        return _of_table(Path(path), classes)
    content = read_json(path, remedy=REMEDY)
    if isinstance(content, list):
        if annotations is None:
            return _of_numbered_results(path, content, classes)
        about = read_json(annotations)
        check_coco_content(annotations, about, annotated=False)
        return _of_results(path, content, annotations, about)
    check_coco_content(path, content, annotated=False, remedy=REMEDY)
    return _of_annotations(path, content)


def _of_annotations(path: StrPath, content: dict[str, Any]) -> DetectionFile:
    names, labels = _classes_of(path, content)
    file = DetectionFile(names, _images_of(content))
    for row in content.get('annotations', ()):
        score = row.get('score', 1.0)
        if not is_number(score) or not 0 <= score <= 1:
            raise data_error(
                f'{path}: annotation {row["id"]}',
                'a score from 0 to 1',
                shown(score),
                REMEDY,
            )
        if row.get('iscrowd'):
            file.dropped[CROWDS] += 1
            continue
        image, label = file.images[row['image_id']], labels[row['category_id']]
        file.add(image, label, _corners(row['bbox']), score)
    return file


def _of_results(
    path: StrPath,
    content: list[Any],
    annotations: StrPath,
    about: dict[str, Any],
) -> DetectionFile:
    names, labels = _classes_of(annotations, about)
    file = DetectionFile(names, _images_of(about))
    _check_results(path, content)
    for key, known in (('image_id', file.images), ('category_id', labels)):
        lost = [row[key] for row in content if row[key] not in known]
        if lost:
            raise data_error(
                path,
                f'detections whose {key} is in {annotations}',
                f'{len(lost)} with another one: '
                f'{some(map(repr, dict.fromkeys(lost)))}',
                'Give the annotations of the images that were looked at.',
            )
    for row in content:
        image, label = file.images[row['image_id']], labels[row['category_id']]
        file.add(image, label, _corners(row['bbox']), row['score'])
    return file


def _of_numbered_results(
    path: StrPath, content: list[Any], classes: Any
) -> DetectionFile:
    if not isinstance(classes, Mapping):
        raise data_error(
            path,
            'a file that names images and categories, or `annotations`',
            'a list of results, which numbers them',
            'Give annotations="instances_….json", or classes=dict(…) with '
            'the name of each category id; images are then found by their '
            'ids.',
        )
    _check_results(path, content)
    names = {str(number): name for number, name in classes.items()}
    labels = {number: label for label, number in enumerate(names)}
    file = DetectionFile(tuple(names.values()), {})
    lost = [r for r in content if str(r['category_id']) not in names]
    if lost:
        ids = dict.fromkeys(row['category_id'] for row in lost)
        raise data_error(
            path,
            f'the category ids {some(names)}',
            f'{len(lost)} detections with another one: {some(ids)}',
            'Name them in `classes`.',
        )
    for row in content:
        image = file.images.setdefault(row['image_id'], Boxed())
        label = labels[str(row['category_id'])]
        file.add(image, label, _corners(row['bbox']), row['score'])
    return file


def _of_table(path: Path, classes: Any) -> DetectionFile:
    rows = read_rows(path)
    found = dict.fromkeys(row.name for row in rows.found)
    names = tuple(sorted(found))
    labels = {name: label for label, name in enumerate(names)}
    if classes is not None and all(name.isdecimal() for name in found):
        names = tuple(classes)
        labels = {str(label): label for label in range(len(names))}
        if lost := [name for name in found if name not in labels]:
            raise data_error(
                path,
                f'classes from 0 to {len(names) - 1}',
                some(lost),
                'Name all of them in `classes`.',
            )
    if not rows.found:
        raise data_error(
            path, 'boxes', f'none in {len(rows.wrong)} rows', REMEDY
        )
    file = DetectionFile(names, {})
    for name in rows.bare:
        file.images.setdefault(name, Boxed(name))
    for row in rows.found:
        image = file.images.setdefault(row.image, Boxed(row.image, row.size))
        file.add(image, labels[row.name], row.corners, row.score)
    if rows.wrong:
        file.dropped[f'{ROWS} (such as {rows.wrong[0]})'] = len(rows.wrong)
    return file


def _check_results(path: StrPath, content: list[Any]) -> None:
    for position, row in enumerate(content):
        problem = problem_of(row, 'bbox')
        if problem is None and not 0 <= row['score'] <= 1:
            problem = f'score={shown(row["score"])}'
        if problem:
            raise data_error(
                f'{path}: entry {position}',
                'a detection with image_id, category_id, bbox (x, y, width, '
                'height) and a score from 0 to 1',
                problem,
                REMEDY,
            )


def _classes_of(
    path: StrPath, content: dict[str, Any]
) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Return the names of the classes, and each one's number by its id."""
    names, groups = object_classes(path, content)
    rows = [r for r in content['categories'] if r['name'] not in groups]
    return tuple(names), {row['id']: i for i, row in enumerate(rows)}


def _images_of(content: dict[str, Any]) -> dict[Any, Boxed]:
    return {
        row['id']: Boxed(
            row['file_name'], (int(row['height']), int(row['width']))
        )
        for row in content['images']
    }


def _corners(box: Sequence[float]) -> tuple[float, float, float, float]:
    x, y, width, height = box
    return x, y, x + width, y + height


# -------------------------------------------------------------------- by name


class ByName:
    """Finds what belongs to a path by the names of files.

    A name fits a path that ends with it, folders included, and the other way
    round: ``train/1.jpg`` fits ``/data/train/1.jpg`` and ``1.jpg``, and not
    ``/data/val/1.jpg``.

    Args:
        values: The names, and what belongs to each.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._of_base: dict[str, list[tuple[tuple[str, ...], Any]]] = {}
        for name, value in values.items():
            parts = _parts(name)
            self._of_base.setdefault(parts[-1], []).append((parts, value))

    def find(self, path: str) -> Any:
        """Return what belongs to a path; None if nothing or several do."""
        wanted = _parts(path)
        fitting = [
            value
            for parts, value in self._of_base.get(wanted[-1], ())
            for shared in [min(len(parts), len(wanted))]
            if parts[-shared:] == wanted[-shared:]
        ]
        return fitting[0] if len(fitting) == 1 else None


def _parts(name: str) -> tuple[str, ...]:
    parts = PurePath(name.replace('\\', '/')).parts
    return tuple(part for part in parts if part not in ('.', '/')) or ('',)
