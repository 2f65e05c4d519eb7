"""Where an image's pixels are after the pipeline, and what lies on them.

MMDetection's transforms multiply what they do to an image into a
``homography_matrix``. Boxes on the original file are brought into the batch by
it, as the ground truth has been. Transforms that cut off a part of the image
note, in addition, where: padding or a warp that follows may show the place of
what is gone, and boxes must not reach into it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import mmcv.transforms as mmcv_transforms
import mmdet.datasets.transforms as transforms
import numpy as np
from mmdet.models.data_preprocessors import BatchFixedSizePad
from mmengine.dataset import Compose

from mmkd.data.class_names import layers
from mmkd.data.errors import some
from mmkd.errors import ConfigError

HOMOGRAPHY = 'homography_matrix'
CUTS = 'cuts'
"""For each cut, the homography up to it, and the height and width after it."""
TOLD = ('img_path', 'img_id', 'ori_shape', 'img_shape', HOMOGRAPHY, CUTS)
"""The meta data that each packed image has to have."""

Names = tuple[str, ...]

RECORDED: Names = (
    *('Resize', 'FixShapeResize', 'FixScaleResize', 'RandomFlip'),
    *('RandomFlip_GLIP',),
)
"""Transforms of MMDetection that note how they move pixels, and cut none."""
STILL: Names = (
    *('Pad', 'PhotoMetricDistortion', 'YOLOXHSVRandomAug'),
    *('CutOut', 'RandomErasing', 'SegRescale'),
    *('ColorTransform', 'Color', 'Brightness', 'Contrast', 'Sharpness'),
    *('Solarize', 'SolarizeAdd', 'Posterize', 'Equalize', 'AutoContrast'),
    *('Invert', 'FilterAnnotations', 'PackDetInputs', 'LoadAnnotations'),
    *('LoadEmptyAnnotations', 'LoadImageFromNDArray', 'LoadProposals'),
    *('LoadMultiChannelImageFromFiles', 'LoadPanopticAnnotations'),
    *('LoadTextAnnotations', 'RandomSamplingNegPos', 'GTBoxSubOne_GLIP'),
)
"""Transforms of MMDetection that move no pixels; they may add some at the
right and at the bottom, or paint over some."""
AROUND: Names = (
    *('AutoAugment', 'RandAugment', 'RandomOrder', 'ResizeShortestEdge'),
)
"""Transforms of MMDetection that only choose and call others."""
STILL_MMCV: Names = ('LoadImageFromFile', 'LoadAnnotations', 'Pad', 'ToTensor')
AROUND_MMCV: Names = (
    *('Compose', 'RandomChoice', 'RandomApply'),
    *('RandomResize', 'RandomChoiceResize'),
)


def _classes(module: Any, names: Names) -> frozenset[type]:
    found = (getattr(module, name, None) for name in names)
    return frozenset(kind for kind in found if isinstance(kind, type))


class NotesCuts:
    """Notes where an image ends after a transform that cuts it."""

    def transform(self, results: Any) -> Any:
        done = super().transform(results)  # type: ignore[misc]
        if done is not None and done.get(HOMOGRAPHY) is not None:
            cut = done[HOMOGRAPHY], tuple(done['img'].shape[:2])
            done[CUTS] = (*done.get(CUTS, ()), cut)
        return done


class NotesWarp(transforms.RandomAffine):
    """Notes how ``RandomAffine`` moves pixels, which MMDetection's does not.

    It has the place of MMDetection's in a pipeline, and draws the same.
    """

    def _get_random_homography_matrix(
        self, height: int, width: int
    ) -> np.ndarray:
        warp = super()._get_random_homography_matrix(height, width)
        self._warp: np.ndarray = warp
        return warp

    def transform(self, results: Any) -> Any:
        before = results.get(HOMOGRAPHY)
        results = super().transform(results)
        warp = self._warp
        results[HOMOGRAPHY] = warp if before is None else warp @ before
        return results


class FollowedAffine(NotesCuts, NotesWarp):
    pass


class FollowedCrop(NotesCuts, transforms.RandomCrop):
    pass


class FollowedRotate(NotesCuts, transforms.Rotate):
    pass


class FollowedShearX(NotesCuts, transforms.ShearX):
    pass


class FollowedShearY(NotesCuts, transforms.ShearY):
    pass


class FollowedTranslateX(NotesCuts, transforms.TranslateX):
    pass


class FollowedTranslateY(NotesCuts, transforms.TranslateY):
    pass


MADE_TO_FOLLOW: dict[type, type] = {
    transforms.RandomAffine: FollowedAffine,
    transforms.RandomCrop: FollowedCrop,
    transforms.Rotate: FollowedRotate,
    transforms.ShearX: FollowedShearX,
    transforms.ShearY: FollowedShearY,
    transforms.TranslateX: FollowedTranslateX,
    transforms.TranslateY: FollowedTranslateY,
}
"""Transforms that cut an image, and the same ones that note it. They are named
classes, so that the workers of a loader can be handed their objects."""
FOLLOWED = (
    _classes(transforms, RECORDED + STILL)
    | _classes(mmcv_transforms, STILL_MMCV)
    | {*MADE_TO_FOLLOW, *MADE_TO_FOLLOW.values()}
)
WRAPPERS = (
    _classes(transforms, AROUND)
    | _classes(mmcv_transforms, AROUND_MMCV)
    | {Compose}
)


# --------------------------------------------------------------------- before


def follow(
    dataset: Any,
    preprocessor: Any,
    where: str,
    trusted: Sequence[str] = (),
) -> None:
    """Let the images of a data set tell how their pixels were moved.

    What packs an image gets further keys of meta data, and what cuts it notes
    where. Nothing else changes, and no random number is drawn.

    Args:
        dataset: The built data set, with all that it wraps.
        preprocessor: The student's data preprocessor.
        where: What asks for it, for the message.
        trusted: Names of transforms that are not known here, and of which the
            user says that they move no pixels, or note it as MMDetection's do.

    Raises:
        ConfigError: If a transform moves pixels without noting it, or is not
            known.
    """
    holders = list(layers(dataset))
    steps = [
        step
        for holder in holders
        for step in _steps(getattr(holder, 'pipeline', None))
    ]
    batch_steps = getattr(preprocessor, 'batch_augments', None) or []
    lost = _unrecorded(steps) + [
        type(step).__name__
        for step in batch_steps
        if type(step) is not BatchFixedSizePad
    ]
    lost = [name for name in dict.fromkeys(lost) if name not in trusted]
    if lost:
        raise ConfigError(
            f'{where} looks at the original files (sees="file"), and its '
            'boxes follow the pixels through the training pipeline. '
            f'{some(lost, 9)} may move pixels without a record. Set '
            'sees="batch" where the teacher can look at the student\'s '
            'pixels, remove the transform, or name it in trusted_transforms '
            'if it moves no pixels.'
        )
    for each in (*holders, *steps):
        if hasattr(each, 'meta_keys'):
            each.meta_keys = tuple(dict.fromkeys((*each.meta_keys, *TOLD)))


def record_moves(pipeline: Any, where: str) -> None:
    """Let the transforms of a pipeline note how they move pixels.

    Args:
        pipeline: A transform or a list of them.
        where: The option that names them, for the message.

    Raises:
        ConfigError: If one may move pixels without noting it.
    """
    if lost := _unrecorded(list(_steps(pipeline))):
        raise ConfigError(
            f'{where}: {some(dict.fromkeys(lost), 9)} may move pixels without '
            'a record, so that the boxes of a teacher could not follow. Take '
            'transforms of MMDetection that note it, such as RandomFlip, '
            'Resize, RandomCrop, RandomAffine or Rotate, or that leave pixels '
            'in place.'
        )


def _unrecorded(steps: Sequence[Any]) -> list[str]:
    """Let transforms note how they move pixels; name those that do not."""
    for step in steps:
        step.__class__ = MADE_TO_FOLLOW.get(type(step), type(step))
    return [
        type(step).__name__ for step in steps if type(step) not in FOLLOWED
    ]


def _steps(pipeline: Any) -> Iterator[Any]:
    """Yield the transforms of a pipeline, those in others included."""
    if isinstance(pipeline, list | tuple):
        for step in pipeline:
            yield from _steps(step)
    elif type(pipeline) in WRAPPERS:
        inner = getattr(pipeline, 'transforms', None)
        yield from _steps([pipeline.resize] if inner is None else inner)
    elif pipeline is not None:
        yield pipeline


# ------------------------------------------------------------------- boxes


def landed(boxes: np.ndarray, sample: Any) -> tuple[np.ndarray, np.ndarray]:
    """Bring boxes on an original image to where a data sample shows them.

    Args:
        boxes: (N, 4), xyxy in pixels of the original image.
        sample: The data sample, whose meta data :func:`follow` has asked for.

    Returns:
        The boxes (N, 4) in pixels of the sample's image, clipped to what is
        left of the original, and the share of each one's area that is left
        (N,).
    """
    matrix = sample.get(HOMOGRAPHY)
    whole, done = moved(boxes, matrix), np.eye(3)
    there = np.ones(len(boxes), bool)
    for until, shape in sample.get(CUTS) or ():
        boxes = clipped(moved(boxes, until @ np.linalg.inv(done)), shape)
        there &= areas(boxes) > 0  # which rounding would bring back
        done = np.asarray(until, np.float64)
    if matrix is not None:
        boxes = moved(boxes, matrix @ np.linalg.inv(done))
    boxes = clipped(boxes, sample.img_shape)
    left = areas(boxes) / np.maximum(areas(whole), 1e-9)
    return boxes, np.where(there, left, 0.0)


def moved(boxes: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Bring boxes to where a homography brings their pixels.

    Args:
        boxes: (N, 4), xyxy in pixels of the original image.
        matrix: (3, 3); None where nothing has moved.

    Returns:
        (N, 4), the smallest upright boxes around the moved corners, as
        MMDetection moves the ground truth.
    """
    if matrix is None or not len(boxes):
        return boxes
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2)
    homogeneous = np.hstack([corners, np.ones((len(corners), 1))])
    points = homogeneous @ np.asarray(matrix, np.float64).T
    points = (points[:, :2] / points[:, 2:]).reshape(-1, 4, 2)
    return np.hstack([points.min(1), points.max(1)])


def clipped(boxes: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Clip boxes (N, 4), xyxy in pixels, to an image of (height, width)."""
    height, width = shape[:2]
    return np.clip(boxes, 0, [width, height, width, height])


def areas(boxes: np.ndarray) -> np.ndarray:
    """Return the areas (N,) of boxes (N, 4), xyxy; 0 for what is none."""
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    return sides[:, 0] * sides[:, 1]
