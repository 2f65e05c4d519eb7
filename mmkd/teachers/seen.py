"""A teacher's detections as objects of the student's view of the images."""

from collections.abc import Sequence

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_project
from mmengine.structures import InstanceData
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.detectors.record import as_tensor

from .view import TeacherView

SMALLEST = 1.0
"""Boxes with a shorter side, in pixels of the student's view, are dropped."""


def seen_objects(view: TeacherView, batch: Batch) -> list[InstanceData]:
    """Return the teacher's detections where and as what the student has them.

    Boxes follow the geometry from the weak to the strong view and are clipped
    to the image. Detections of classes that the student does not have, and
    boxes that leave the image, are dropped.

    Args:
        view: The teacher's view of ``batch.weak``, or of the batch itself if
            that is None.
        batch: What the student sees.

    Returns:
        For each image ``bboxes`` (n, 4) as xyxy in pixels of the batch,
        ``labels`` of the student's classes, ``scores``, and ``index`` (n,)
        into the teacher's own detections.
    """
    if 'seen_objects' not in view.cache:
        weak = batch.weak or batch
        view.cache['seen_objects'] = [
            _seen(found, view.class_map.to_student, *samples)
            for found, samples in zip(
                view.detections,
                zip(weak.data_samples, batch.data_samples, strict=True),
                strict=True,
            )
        ]
    return view.cache['seen_objects']


def _seen(
    found: InstanceData,
    to_student: Tensor,
    weak: DetDataSample,
    strong: DetDataSample,
) -> InstanceData:
    boxes = as_tensor(found.bboxes).float().clone()  # clipped in place
    labels = to_student[found.labels]
    if (moves := homography(weak, strong)) is not None:
        boxes = bbox_project(boxes, boxes.new_tensor(moves))
    height, width = strong.img_shape[:2]
    boxes[:, 0::2].clamp_(0, width)
    boxes[:, 1::2].clamp_(0, height)
    sides = boxes[:, 2:] - boxes[:, :2]
    kept = (labels >= 0) & (sides >= SMALLEST).all(-1)
    (index,) = kept.nonzero(as_tuple=True)
    return InstanceData(
        bboxes=boxes[index],
        labels=labels[index],
        scores=found.scores[index],
        index=index,
    )


def homography(
    weak: DetDataSample, strong: DetDataSample
) -> np.ndarray | None:
    """Return what moves the weak view's pixels to the strong one's, (3, 3).

    None where they are the same.
    """
    eye = np.eye(3)
    first = np.asarray(weak.get('homography_matrix', eye), float)
    second = np.asarray(strong.get('homography_matrix', eye), float)
    if np.array_equal(first, second):
        return None
    return second @ np.linalg.inv(first)


def same_geometry(batch: Batch) -> bool:
    """Return whether both views of unlabelled images have the same pixels."""
    if batch.weak is None:
        return True
    pairs = zip(batch.weak.data_samples, batch.data_samples, strict=True)
    return all(
        tuple(weak.img_shape) == tuple(strong.img_shape)
        and homography(weak, strong) is None
        for weak, strong in pairs
    )


def with_objects(
    batch: Batch, objects: Sequence[InstanceData]
) -> list[DetDataSample]:
    """Return data samples whose ground truth is given objects.

    Args:
        batch: The images.
        objects: Each image's ``bboxes`` (n, 4), xyxy, and ``labels`` (n,).
    """
    samples = []
    for sample, each in zip(batch.data_samples, objects, strict=True):
        copy = DetDataSample(metainfo=sample.metainfo)
        copy.gt_instances = InstanceData(
            bboxes=each.bboxes, labels=each.labels
        )
        copy.ignored_instances = InstanceData(
            bboxes=torch.zeros_like(each.bboxes[:0]),
            labels=each.labels[:0],
        )
        samples.append(copy)
    return samples
