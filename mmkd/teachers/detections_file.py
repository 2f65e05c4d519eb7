"""A teacher that is a file of boxes."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from mmengine.logging import print_log

from mmkd.data.batch import Batch
from mmkd.data.class_names import parts
from mmkd.data.detections import Boxed, ByName, read_detections
from mmkd.data.errors import data_error, some
from mmkd.errors import ConfigError, DataError

from .detections import (
    KNOWN,
    NOTHING,
    WHERE,
    DetectionsTeacher,
    Found,
    check_choices,
    path_of,
)
from .view import TeacherContext

MATCHES = ('name', 'id')


class DetectionsFile(DetectionsTeacher):
    """A file with the detections of the training images.

    Args:
        file: A COCO result file (a list of ``image_id``, ``category_id``,
            ``bbox`` and ``score``), a COCO annotation file, whose objects may
            have a ``score``, as ``mmkd label`` writes it, or a table of boxes
            (CSV). Boxes are in pixels of the original images.
        annotations: For a result file, the annotation file that names its
            images and categories.
        classes: For a result file without ``annotations``, the name of each
            category id; images are then found by their ids. For a table whose
            classes are numbers, their names in order, or a known list.
        match: ``'name'`` finds an image by the end of its path, ``'id'`` by
            its ``img_id``. By default it is the name, if the file has names.
        score_thr: Boxes of a lower score are left out.
        context: What the teacher is told about the training.
        **options: As in
            :class:`~mmkd.teachers.detections.DetectionsTeacher`, without
            ``sees``: a file knows the original images alone.

    Raises:
        ConfigError: If an option is wrong, or no class is shared.
        DataError: If the file is damaged or of another kind.
    """

    def __init__(
        self,
        *,
        file: str,
        context: TeacherContext,
        annotations: str | None = None,
        classes: Sequence[str] | Mapping[Any, str] | str | None = None,
        match: str | None = None,
        score_thr: float = 0.05,
        **options: Any,
    ) -> None:
        check_choices(1, score_thr=score_thr)
        if options.get('sees', 'file') != 'file':
            raise ConfigError(
                f'{WHERE} (DetectionsFile): sees={options["sees"]!r} is for '
                'teachers that run; a file knows the original images alone. '
                'Leave it out.'
            )
        if isinstance(classes, str):
            classes = KNOWN.get(classes, (classes,))
        read = read_detections(file, annotations, classes)
        super().__init__(read.classes, context=context, **options)
        self.file, self._images = file, read.images
        named = {b.name: b for b in read.images.values() if b.name is not None}
        if match is None:
            match = 'name' if named else 'id'
        if match not in MATCHES or (match == 'name' and not named):
            raise ConfigError(
                f"{WHERE}.match must be 'name' or 'id', and 'name' only for "
                f'a file that names its images; got {match!r}.'
            )
        self.match, self.score_thr = match, score_thr
        self._by_name = ByName(named)
        self._known: dict[Any, Found] = {}
        for what, count in read.dropped.items():
            print_log(
                f'{file}: {count} {what} are left out',
                'current',
                logging.WARNING,
            )

    def find(self, batch: Batch, log: dict[str, float]) -> list[Found]:
        return [
            self._found(path_of(sample), sample.get('img_id'))
            for sample in batch.data_samples
        ]

    def prepare_data(self, dataset: Any) -> None:
        super().prepare_data(dataset)
        infos = list(_infos(dataset))
        unknown = [
            info for info in infos if self._boxed(*_identity(info)) is None
        ]
        if len(unknown) == len(infos):
            raise self._refusal(infos)
        if unknown:
            print_log(
                f'{self.file} has nothing about {len(unknown)} of '
                f'{len(infos)} training images, and teaches nothing on them: '
                f'{some(_shown(info, self.match) for info in unknown)}',
                'current',
                logging.WARNING,
            )
        self._check_sizes(infos)

    def describe(self) -> str:
        count = sum(len(image.boxes) for image in self._images.values())
        return (
            f'{super().describe()}, {count} boxes on {len(self._images)} '
            f'images in {self.file}'
        )

    def _found(self, path: str, number: Any) -> Found:
        key = path if self.match == 'name' else number
        if key not in self._known:
            boxed = self._boxed(path, number)
            self._known[key] = (
                NOTHING if boxed is None else _arrays(boxed, self.score_thr)
            )
        return self._known[key]

    def _boxed(self, path: str, number: Any) -> Boxed | None:
        if self.match == 'name':
            return self._by_name.find(path)
        for key in (number, str(number)):
            if key in self._images:
                return self._images[key]
        return None

    def _refusal(self, infos: Sequence[Any]) -> DataError:
        theirs = [
            str(number) if self.match == 'id' else str(image.name)
            for number, image in self._images.items()
        ]
        other = 'id' if self.match == 'name' else 'name'
        return data_error(
            self.file,
            'detections of the training images, which are found by their '
            f'{self.match}s',
            f'{some(theirs)}; the training images are '
            f'{some(_shown(info, self.match) for info in infos)}',
            'Give the file of these images, let its names end as the paths '
            f'do, or set match={other!r}.',
        )

    def _check_sizes(self, infos: Sequence[Any]) -> None:
        """Refuse boxes on images of another size than the training's."""
        wrong = []
        for info in infos:
            boxed = self._boxed(*_identity(info))
            ours = info.get('height'), info.get('width')
            theirs = None if boxed is None else boxed.size
            if theirs is not None and None not in ours and theirs != ours:
                wrong.append((info, theirs, ours))
        if wrong:
            info, theirs, ours = wrong[0]
            raise data_error(
                self.file,
                'boxes in pixels of the training images',
                f'{len(wrong)} images of another size, such as '
                f'{info["img_path"]}: {theirs[0]} x {theirs[1]} (H x W) in '
                f'the file, {ours[0]} x {ours[1]} in the training data',
                'Detect on the original images.',
            )


def _infos(dataset: Any) -> Iterator[Any]:
    for part in parts(dataset):
        if hasattr(part, 'get_data_info'):
            for index in range(len(part)):
                yield part.get_data_info(index)


def _identity(info: Mapping[str, Any]) -> tuple[str, Any]:
    return info.get('img_path', ''), info.get('img_id')


def _shown(info: Mapping[str, Any], match: str) -> str:
    return str(_identity(info)[match == 'id'])


def _arrays(boxed: Boxed, score_thr: float) -> Found:
    found = Found(
        np.array(boxed.boxes, np.float32).reshape(-1, 4),
        np.array(boxed.scores, np.float32),
        np.array(boxed.labels, np.int64),
    )
    return found.at(found.scores >= score_thr)
