"""Teachers that give boxes and nothing else."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from mmdet.datasets import CocoDataset, VOCDataset
from mmengine.structures import InstanceData

from mmkd.data.batch import Batch
from mmkd.detectors.pixels import flips, mean_std
from mmkd.errors import ConfigError

from .geometry import HOMOGRAPHY, areas, clipped, follow, landed
from .view import DETECTIONS, Teacher, TeacherContext, TeacherView

WHERE = 'distillation.teacher'
KNOWN = {
    'coco': tuple(CocoDataset.METAINFO['classes']),
    'voc': tuple(VOCDataset.METAINFO['classes']),
}
"""Well-known lists of class names."""
NO_CLASS = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
"""The numbers up to 90 that are no category of COCO."""
SEES = ('file', 'batch')


class Found(NamedTuple):
    """What a detector has found in an image."""

    boxes: np.ndarray
    """(N, 4), float32, xyxy in pixels of the image that was looked at."""
    scores: np.ndarray
    """(N,), float32, probabilities."""
    labels: np.ndarray
    """(N,), int64, the detector's own classes."""

    def at(self, index: np.ndarray) -> 'Found':
        """Return some of the boxes, by a mask or by numbers."""
        return Found(*(part[index] for part in self))


NOTHING = Found(
    np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, int)
)


class DetectionsTeacher(Teacher):
    """A teacher of which only the detections are known.

    A kind of it overrides :meth:`find`. What it finds on the original file
    follows the pixels into the batch: resized, flipped, cropped and warped as
    the ground truth is.

    Args:
        classes: The names of its classes, in the order of its labels, or the
            name of a known list: ``'coco'``, ``'voc'``, or ``'coco91'`` for
            labels that are COCO's category ids.
        context: What the teacher is told about the training.
        class_map: The teacher's names of some of the student's classes; see
            :class:`~mmkd.teachers.class_map.ClassMap`.
        sees: ``'file'`` for the original image file, or ``'batch'`` for the
            student's image after augmentation, with any pipeline.
        min_visible: A box of which the pipeline has left a smaller share than
            this within the image is dropped: from so small a part, nobody
            could tell what it is.
        trusted_transforms: Names of the pipeline's transforms that are known
            to move no pixels, or to note it as MMDetection's do. Others that
            mmkd does not know are refused with ``sees='file'``.

    Raises:
        ConfigError: If an option is wrong, or no class is shared.
    """

    gives = frozenset({DETECTIONS})
    remedy = 'Its boxes are all that is known of it. '

    def __init__(
        self,
        classes: Sequence[str] | str,
        *,
        context: TeacherContext,
        class_map: Mapping[str, str | None] | None = None,
        sees: str = 'file',
        min_visible: float = 0.2,
        trusted_transforms: Sequence[str] = (),
    ) -> None:
        if sees not in SEES:
            raise ConfigError(
                f"{WHERE}.sees must be one of 'file', 'batch', got {sees!r}."
            )
        check_choices(1, min_visible=min_visible)
        self.classes = class_list(classes)
        self.class_map = context.class_map(self.classes, class_map)
        self.sees, self.min_visible = sees, min_visible
        self.trusted_transforms = tuple(trusted_transforms)
        self._preprocessor = getattr(
            context.student, 'data_preprocessor', None
        )

    def find(self, batch: Batch, log: dict[str, float]) -> list[Found]:
        """Return what it finds in each image of a batch.

        Args:
            batch: The student's batch.
            log: Takes numbers about this step for the log.

        Returns:
            Boxes in pixels of the original file, or, if it ``sees`` the
            batch, of the batch.
        """
        raise NotImplementedError

    def view(self, batch: Batch) -> 'DetectionsView':
        return DetectionsView(self, batch)

    def blank(self, device: torch.device) -> 'DetectionsView':
        view = DetectionsView(self, Batch(torch.zeros(1, 3, 32, 32), []))
        view.__dict__['detections'] = [as_instances(NOTHING, device)]
        return view

    def prepare_data(self, dataset: Any) -> None:
        if self.sees == 'file':
            follow(
                dataset,
                self._preprocessor,
                f'{WHERE} ({type(self).__name__})',
                self.trusted_transforms,
            )

    def to(self, device: torch.device) -> 'DetectionsTeacher':
        self.class_map.to(device)
        return self

    def describe(self) -> str:
        return f'{type(self).__name__}, its classes are {self.class_map}'

    def placed(self, found: Found, sample: Any) -> Found:
        """Return boxes where the student sees them, without those outside.

        Args:
            found: Boxes in pixels of the original file, or of the batch.
            sample: The data sample of the image.
        """
        if self.sees == 'file':
            if sample.get(HOMOGRAPHY) is None and _has_moved(sample):
                raise ConfigError(
                    f'{WHERE} ({type(self).__name__}) follows the pixels of '
                    'its images, and the data sample of '
                    f'{sample.get("img_path")} has no {HOMOGRAPHY}. Call '
                    'prepare_data(dataset) of the teacher before the images '
                    'are read, as the runner does.'
                )
            boxes, left = landed(found.boxes, sample)
        else:
            boxes = clipped(found.boxes, sample.img_shape)
            left = areas(boxes) / np.maximum(areas(found.boxes), 1e-9)
        seen = (left > 0) & (left >= self.min_visible)
        return found._replace(boxes=boxes).at(seen)

    def pixels(self, batch: Batch) -> list[np.ndarray]:
        """Return the images of a batch as the pipeline has made them.

        Returns:
            Each image, (H, W, 3), uint8, RGB, without padding.
        """
        mean, std = mean_std(self._preprocessor)
        images = batch.inputs.detach().float().cpu()
        images = images * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
        images = images.round().clamp(0, 255).to(torch.uint8)
        if not flips(self._preprocessor):  # they are BGR, as they were read
            images = images.flip(1)
        arrays = images.permute(0, 2, 3, 1).numpy()
        return [
            np.ascontiguousarray(image[: shape[0], : shape[1]])
            for image, shape in zip(
                arrays, (s.img_shape for s in batch.data_samples), strict=True
            )
        ]


class DetectionsView(TeacherView):
    """The detections of one batch, which are looked up when they are read."""

    def __init__(self, teacher: DetectionsTeacher, batch: Batch) -> None:
        self.class_map = teacher.class_map
        self.cache: dict[str, Any] = {}
        self._teacher, self._batch = teacher, batch
        self._log: dict[str, float] = {}

    @functools.cached_property
    def detections(self) -> list[InstanceData]:
        """Each image's boxes (xyxy, pixels of the batch), scores, labels."""
        batch, teacher = self._batch, self._teacher
        found = teacher.find(batch, self._log)
        return [
            as_instances(teacher.placed(each, sample), batch.inputs.device)
            for each, sample in zip(found, batch.data_samples, strict=True)
        ]

    def statistics(self) -> dict[str, float]:
        return self._log


def _has_moved(sample: Any) -> bool:
    """Tell from other meta data whether a transform must have noted it."""
    scale = np.ravel(sample.get('scale_factor', 1.0))
    return bool((scale != 1).any() or sample.get('flip'))


def path_of(sample: Any) -> str:
    """Return the file of a data sample's image.

    Raises:
        ConfigError: If it has none, as images that were made up.
    """
    path = sample.get('img_path')
    if path is None:
        raise ConfigError(
            f'{WHERE}: a teacher of boxes knows images by their files, and a '
            'data sample has no img_path. Give it images of a data set, and '
            'let PackDetInputs pack img_path.'
        )
    return path


def as_instances(found: Found, device: torch.device) -> InstanceData:
    """Return detections as MMDetection has them, on a device."""
    return InstanceData(
        bboxes=torch.from_numpy(found.boxes.astype(np.float32)).to(device),
        scores=torch.from_numpy(found.scores.astype(np.float32)).to(device),
        labels=torch.from_numpy(found.labels.astype(np.int64)).to(device),
    )


def class_list(classes: Any) -> tuple[str, ...]:
    """Return class names, which may be given as the name of a known list.

    Raises:
        ConfigError: If they are no names.
    """
    if classes == 'coco91':
        names = iter(KNOWN['coco'])
        return tuple(
            f'no class ({number})' if number in NO_CLASS else next(names)
            for number in range(91)
        )
    if isinstance(classes, str) and classes in KNOWN:
        return KNOWN[classes]
    listed = isinstance(classes, list | tuple) and classes
    if listed and all(isinstance(name, str) for name in classes):
        return tuple(classes)
    raise ConfigError(
        f"{WHERE}.classes must be the teacher's class names in the order of "
        'its labels, or one of the known lists coco, voc, coco91; got '
        f'{classes!r}.'
    )


def check_choices(most: Any, **shares: Any) -> None:
    """Check the options that choose among boxes.

    Args:
        most: ``max_per_image``.
        shares: Options between 0 and 1, by name.

    Raises:
        ConfigError: If one is outside its range.
    """
    for name, value in shares.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1:
            raise ConfigError(
                f'{WHERE}.{name} must be between 0 and 1, got {value!r}.'
            )
    if type(most) is not int or most < 1:
        raise ConfigError(
            f'{WHERE}.max_per_image must be a whole number from 1, got '
            f'{most!r}.'
        )
