"""Soft labels of a dense head, alone and with LAD (SoLAD)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmdet.models.losses import GIoULoss
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from mmdet.utils import reduce_mean
from torch import Tensor

from mmkd.core.method import Method
from mmkd.data.batch import Batch
from mmkd.detectors.assignment.fit import dense_facts
from mmkd.detectors.dense import anchors_on_images, student_dense
from mmkd.detectors.dense_checks import check_same_priors
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError
from mmkd.losses import FocalKLLoss
from mmkd.registry import METHODS
from mmkd.teachers.view import DENSE, TeacherView

from .lad import LAD


@METHODS.register_module()
class SoftLabelDistillation(Method):
    r"""Soft labels of a dense head: classes, IoU branch and boxes.

    .. math::
        L = \frac{1}{A} \Big(
            w_{cls} \sum_{a, c} FKL(p^t_{ac}, p^s_{ac})
            + \sum_{a \in V} \big[ w_{iou} FKL(q^t_a, q^s_a)
            + w_{box} \, u_a \, GIoU(b^t_a, b^s_a) \big] \Big),
        \quad A = \sum_{a \in V} u_a

    FKL is :class:`~mmkd.losses.FocalKLLoss`, :math:`u_a` is the largest IoU
    of the teacher's decoded box with an object, and :math:`V` holds the
    anchors where it is above ``min_iou``. Anchors on padding do not count.
    The method fits sigmoid heads with anchors and a box coder (PAA, ATSS,
    DDOD, RetinaNet). The IoU (centerness) term is left out where there is no
    such branch.

    Source: Nguyen et al., "Improving Object Detection by Label Assignment
    Distillation", WACV 2022, https://arxiv.org/abs/2108.10520: the baseline,
    and the soft part of SoLAD. In the official code, the class sum also runs
    over anchors on padding, A is not averaged over the processes, and a sum
    is divided by the machine precision where A is 0. Here A is averaged and
    is at least 1.

    Args:
        cls_weight: :math:`w_{cls}`.
        iou_weight: :math:`w_{iou}`.
        box_weight: :math:`w_{box}`.
        min_iou: Threshold of V, from 0 to 1.
        gamma: Exponent of FKL's focusing factor.
        loss_weight: Weight of the method.

    Raises:
        ConfigError: If an option is outside its range or the pair of
            detectors does not fit.
    """

    needs = (DENSE,)

    def __init__(
        self,
        *,
        cls_weight: float = 10.0,
        iou_weight: float = 10.0,
        box_weight: float = 1.3,
        min_iou: float = 0.1,
        gamma: float = 0.5,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        self.check_not_negative(
            cls_weight=cls_weight,
            iou_weight=iou_weight,
            box_weight=box_weight,
        )
        self.check_option(
            0 <= min_iou < 1, 'min_iou', min_iou, 'at least 0 and below 1'
        )
        self.cls_weight, self.iou_weight = cls_weight, iou_weight
        self.box_weight, self.min_iou = box_weight, min_iou
        self.divergence = FocalKLLoss(gamma=gamma, reduction='none')
        self.giou = GIoULoss(reduction='none')

    def prepare(self, student: StepRecord, teacher: TeacherView) -> None:
        name = type(self).__name__
        heads = [dense_facts(x.facts, name) for x in (student, teacher)]
        for facts in heads:
            if not (
                getattr(facts.head, 'use_sigmoid_cls', facts.sigmoid)
                and hasattr(facts.coder, 'means')
            ):
                raise ConfigError(
                    f'{name} fits sigmoid heads with anchors and box deltas '
                    f'(PAA, ATSS, DDOD, RetinaNet), got {facts.kind}'
                )
        check_same_priors(heads[0], heads[1], name, shapes=True)

    def forward(
        self, student: StepRecord, teacher: TeacherView, batch: Batch
    ) -> dict[str, Tensor]:
        own, other = student_dense(student), teacher.dense
        assert own.regression is not None
        assert other.regression is not None
        anchors, valid = anchors_on_images(own, batch.data_samples)
        boxes = own.facts.coder.decode(anchors, own.regression.float())
        with torch.no_grad():
            teacher_boxes = other.facts.coder.decode(
                anchors, other.regression.float()
            )
            overlap = best_overlap(teacher_boxes, batch.data_samples) * valid
            overlap = overlap * (overlap > self.min_iou)
            average = reduce_mean(overlap.sum()).clamp(min=1)
        logits, teacher_logits = own.logits, other.logits
        shared = teacher.class_map
        if not shared.identical:
            logits = logits[..., shared.student_index]
            teacher_logits = teacher_logits[..., shared.teacher_index]
        divergence = self.divergence(logits, teacher_logits)
        apart = self.giou(boxes.flatten(0, 1), teacher_boxes.flatten(0, 1))
        losses = {
            'soft_cls': self.cls_weight * (divergence * valid[..., None]),
            'soft_bbox': self.box_weight * (apart * overlap.flatten()),
        }
        if own.quality is not None and other.quality is not None:
            losses['soft_iou'] = self.iou_weight * (
                self.divergence(own.quality, other.quality) * (overlap > 0)
            )
        return {name: loss.sum() / average for name, loss in losses.items()}


@METHODS.register_module()
class SoLAD(LAD):
    """SoLAD: LAD and soft labels together.

    It is :class:`LAD` for the assignment, together with
    :class:`SoftLabelDistillation` with the weights below.

    Source: Nguyen et al., "Improving Object Detection by Label Assignment
    Distillation", WACV 2022, https://arxiv.org/abs/2108.10520. The
    weights are those of its official code.

    Args:
        soft: Options of :class:`SoftLabelDistillation` other than these
            defaults: ``cls_weight=2, min_iou=0.5``.
        box_weighting: See :class:`LAD`.
        keep_single: See :class:`LAD`.
        loss_weight: Weight of the soft labels; 0 also switches LAD off.
    """

    def __init__(
        self,
        *,
        soft: Mapping[str, Any] | None = None,
        box_weighting: str = 'iou',
        keep_single: bool = False,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(
            box_weighting=box_weighting,
            keep_single=keep_single,
            loss_weight=loss_weight,
        )
        options = {'cls_weight': 2.0, 'min_iou': 0.5, **(soft or {})}
        try:
            self.soft = SoftLabelDistillation(**options)
        except TypeError as error:
            raise ConfigError(f'SoLAD.soft: {error}') from error

    def prepare(self, student: StepRecord, teacher: TeacherView) -> None:
        super().prepare(student, teacher)
        self.soft.prepare(student, teacher)

    def forward(
        self,
        student: StepRecord,
        teacher: TeacherView,
        batch: Batch,
    ) -> dict[str, Tensor]:
        return self.soft(student, teacher, batch)


def best_overlap(
    boxes: Tensor, data_samples: Sequence[DetDataSample]
) -> Tensor:
    """Return the largest IoU of each box with an object of its image.

    Args:
        boxes: (B, N, 4), xyxy in pixels.
        data_samples: The B images, with their objects.

    Returns:
        (B, N), 0 in an image without objects.
    """
    objects = [sample.gt_instances.bboxes for sample in data_samples]
    most = max(1, *map(len, objects)) if objects else 1
    padded = boxes.new_zeros(len(objects), most, 4)
    for row, gt in zip(padded, objects, strict=True):
        row[: len(gt)] = gt if isinstance(gt, Tensor) else gt.tensor
    return bbox_overlaps(boxes, padded).amax(2)
