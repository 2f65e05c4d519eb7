"""A teacher's boxes complete the ground truth of labelled images."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from mmengine.logging import print_log
from mmengine.structures import InstanceData
from torch import Tensor

from mmkd.core.method import Method
from mmkd.data.batch import Batch
from mmkd.detectors.assignment.weighted import (
    MIN_SHARE,
    TARGETS,
    WEIGHTS,
    check_weighable,
    takes_soft_targets,
    weighted_objects,
    with_objects,
)
from mmkd.detectors.record import StepRecord
from mmkd.registry import METHODS
from mmkd.teachers.class_map import ClassMap
from mmkd.teachers.view import DETECTIONS, TeacherView

WAITED = 200
"""A teacher that is sure of nothing in so many images is warned of."""


class Judged(NamedTuple):
    """What a teacher's boxes mean beside the ground truth of an image."""

    extra: InstanceData
    """``bboxes`` (xyxy, pixels), ``labels`` of the student's classes and
    ``scores`` of objects that the ground truth lacks."""
    regions: Tensor
    """(R, 4), xyxy in pixels, where the teacher is in doubt."""
    partners: Tensor
    """(n,) the best score of a teacher's box for each object, 0 if none."""


@METHODS.register_module()
class TeacherBoxes(Method):
    r"""The teacher's boxes complete the ground truth of labelled images.

    A box of the teacher has a partner if it overlaps an object of the same
    class by an IoU of at least ``iou_thr``. Without one,

    * from a score s of ``score_thr`` on, it becomes one more object. The
      stock losses of the priors, RoIs or queries that are assigned to it
      (classes, boxes, and the RPN's) are multiplied by ``loss_weight`` s;
    * from ``doubtful_thr`` on, it is a region to ignore: priors, RoIs and
      predicted boxes that are assigned to no object, and half or more of
      which lies in such a region, do not count as background;
    * below, it is nothing.

    With a partner it softens the target of the partner's class to
    :math:`(1 - \alpha) + \alpha s`, where the class loss takes soft targets:
    in GFL. There this factor multiplies the IoU, which is the target of stock
    training.

    The student's own loss is the only one that changes, and only in a batch
    in which there is an object, a region or a soft target. What it divides
    its sums by is stock: an additional object counts as one whatever its
    weight. The ground truth in the batch, which other methods read, is not
    changed, and neither are the losses of peers. Boxes in regions that the
    annotators have marked as ignored (crowds), classes that the student does
    not have, and boxes of less than a pixel are left out.

    Source: Wang, Yang, Cao, Zhang, "Co-mining: Self-Supervised Learning for
    Sparsely Annotated Object Detection", AAAI 2021,
    https://arxiv.org/abs/2012.01950, in which the two branches of one network
    add their confident boxes to each other's ground truth, without weights.
    A separate teacher, the scores as weights, the regions and the soft
    targets are mmkd's.

    It fits RetinaNet, ATSS, GFL, Faster and Cascade R-CNN without masks,
    DETR, Conditional DETR, DAB-DETR, Deformable DETR and DINO.

    Args:
        score_thr: The least score of an additional object.
        doubtful_thr: The least score of a region to ignore. With the value of
            ``score_thr`` there are none.
        iou_thr: The least IoU of a box and its partner.
        soften: :math:`\alpha`, from 0 to 1.
        loss_weight: Multiplies the scores of additional objects. 0 switches
            the method off; factors that a schedule sets do not count.

    Raises:
        ConfigError: If an option is outside its range, or the student's head
            makes targets or losses of another kind.
    """

    needs = (DETECTIONS,)
    steers = True

    def __init__(
        self,
        *,
        score_thr: float = 0.7,
        doubtful_thr: float = 0.3,
        iou_thr: float = 0.5,
        soften: float = 0.0,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        self.check_positive(score_thr=score_thr, iou_thr=iou_thr)
        self.check_not_negative(doubtful_thr=doubtful_thr, soften=soften)
        for name, value in (
            ('score_thr', score_thr),
            ('iou_thr', iou_thr),
            ('soften', soften),
        ):
            self.check_option(value <= 1, name, value, 'at most 1')
        self.check_option(
            doubtful_thr <= score_thr,
            'doubtful_thr',
            doubtful_thr,
            f'at most score_thr ({score_thr})',
        )
        self.score_thr, self.doubtful_thr = score_thr, doubtful_thr
        self.iou_thr, self.soften = iou_thr, soften
        self._unsure = 0  # images without a sure box; -1 after the first one

    def prepare(self, student: StepRecord, teacher: TeacherView) -> None:
        check_weighable(student.facts, type(self).__name__)
        if self.soften and not takes_soft_targets(student.facts):
            print_log(
                f'TeacherBoxes.soften={self.soften} is left out: the class '
                f'loss of {student.facts.name} takes no soft targets, as '
                "GFL's does.",
                'current',
                logging.WARNING,
            )
            self.soften = 0.0

    @contextmanager
    def steer(
        self, student: StepRecord, teacher: TeacherView, batch: Batch
    ) -> Iterator[Sequence[DetDataSample] | None]:
        judged = [
            self.judge(sample, found, teacher.class_map)
            for sample, found in zip(
                batch.data_samples, teacher.detections, strict=True
            )
        ]
        self._note(judged)
        if not any(self._changes(each) for each in judged):
            yield None
            return
        with weighted_objects(student.model):
            yield [
                self._completed(sample, each)
                for sample, each in zip(
                    batch.data_samples, judged, strict=True
                )
            ]

    @torch.no_grad()
    def judge(
        self, sample: DetDataSample, found: InstanceData, classes: ClassMap
    ) -> Judged:
        """Compare a teacher's boxes with the ground truth of an image.

        Args:
            sample: The image and its ground truth.
            found: The teacher's ``bboxes`` (xyxy, pixels), ``scores`` and
                ``labels`` of its own classes.
            classes: The class map.
        """
        own = sample.gt_instances
        boxes = _clipped(found.bboxes.to(own.bboxes), sample.img_shape)
        labels = classes.to_student[found.labels]
        sizes = boxes[:, 2:] - boxes[:, :2]  # NaN is no size
        valid = (labels >= 0) & (sizes >= 1).all(1) & found.scores.isfinite()
        alike = labels[:, None] == own.labels
        overlaps = bbox_overlaps(boxes, own.bboxes)
        partner = alike & (overlaps >= self.iou_thr) & valid[:, None]
        scores = found.scores.to(boxes).where(valid, -1)
        alone = valid & ~partner.any(1) & ~_in_crowd(boxes, sample)
        extra = alone & (scores >= self.score_thr)
        doubtful = alone & ~extra & (scores >= self.doubtful_thr)
        of_partners = scores[:, None].where(partner, 0.0)
        none = scores.new_zeros(1, len(own.labels))
        return Judged(
            InstanceData(
                bboxes=boxes[extra], labels=labels[extra], scores=scores[extra]
            ),
            boxes[doubtful],
            torch.cat([none, of_partners]).amax(0),
        )

    def _changes(self, judged: Judged) -> bool:
        """Return whether there is anything to change in an image's loss."""
        if len(judged.extra) or len(judged.regions):
            return True
        return bool(self.soften) and bool((judged.partners > 0).any())

    def _completed(
        self, sample: DetDataSample, judged: Judged
    ) -> DetDataSample:
        """Return an image with the additional objects and the regions."""
        own, extra, partners = sample.gt_instances, *judged[::2]
        softened = 1 - self.soften + self.soften * partners
        weights = self.loss_weight * extra.scores
        objects = InstanceData(
            bboxes=torch.cat([own.bboxes, extra.bboxes]),
            labels=torch.cat([own.labels, extra.labels]),
        )
        setattr(
            objects, WEIGHTS, torch.cat([torch.ones_like(partners), weights])
        )
        targets = softened.where(partners > 0, 1.0)
        setattr(
            objects, TARGETS, torch.cat([targets, torch.ones_like(weights)])
        )
        return with_objects(sample, objects, judged.regions)

    def _note(self, judged: Sequence[Judged]) -> None:
        """Log what was found, and warn of a threshold that leaves nothing."""
        device = judged[0].partners.device
        matched = torch.stack([(each.partners > 0).sum() for each in judged])
        extra = sum(len(each.extra) for each in judged)
        doubtful = sum(len(each.regions) for each in judged)
        self.statistics = {
            'extra': torch.tensor(extra / len(judged), device=device),
            'doubtful': torch.tensor(doubtful / len(judged), device=device),
            'matched': matched.float().mean(),
        }
        if self._unsure < 0:
            return
        sure = extra or any(
            bool((each.partners >= self.score_thr).any()) for each in judged
        )
        self._unsure = -1 if sure else self._unsure + len(judged)
        if self._unsure >= WAITED:
            self._unsure = -1
            print_log(
                f'TeacherBoxes: in {WAITED} images the teacher has found no '
                f'box with a score of {self.score_thr} or more. Lower '
                'score_thr.',
                'current',
                logging.WARNING,
            )


def _clipped(boxes: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the part of boxes (n, 4) that lies on the image."""
    height, width = shape[:2]
    limits = boxes.new_tensor([width, height, width, height])
    return boxes.clamp(min=0).minimum(limits)


def _in_crowd(boxes: Tensor, sample: DetDataSample) -> Tensor:
    """Return (n,), which boxes lie where the annotators ignore objects."""
    ignored = sample.get('ignored_instances')
    if ignored is None or not len(ignored):
        return boxes.new_zeros(len(boxes), dtype=torch.bool)
    shares = bbox_overlaps(boxes, ignored.bboxes, mode='iof')
    return shares.amax(1) >= MIN_SHARE
