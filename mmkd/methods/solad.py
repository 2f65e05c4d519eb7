"""Soft labels of a dense head, alone and with LAD (SoLAD)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from mmdet.models.losses import GIoULoss
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from mmdet.utils import reduce_mean
from torch import Tensor

from mmkd.core.method import Method
from mmkd.detectors.assignment.fit import dense_head
from mmkd.detectors.assignment.paa import flat_predictions
from mmkd.detectors.dense_checks import check_same_priors
from mmkd.detectors.record import Outputs, flatten_levels
from mmkd.errors import ConfigError
from mmkd.losses import FocalKLLoss
from mmkd.registry import METHODS

from .lad import LabelAssignmentDistillation

if TYPE_CHECKING:
    from mmkd.teachers.frozen_view import TeacherOutputs


@METHODS.register_module()
class SoftLabelDistillation(Method):
    r"""Soft labels of a dense head: classes, IoU branch and boxes.

    .. math::
        L = \frac{1}{A} \Big(
            w_{cls} \sum_{a, c} FKL(p^t_{ac}, p^s_{ac})
            + \sum_{a \in V} \big[ w_{iou} FKL(q^t_a, q^s_a)
            + w_{box} \, u_a \, GIoU(b^t_a, b^s_a) \big] \Big),
        \quad A = \sum_{a \in V} u_a

    FKL is :class:`~mmkd.losses.FocalKLLoss`, :math:`u_a` the largest IoU of
    the teacher's decoded box with an object and :math:`V` the anchors where
    it is above ``min_iou``. Anchors on padding do not count. Fits sigmoid
    heads with anchors and a box coder (PAA, ATSS, DDOD, RetinaNet); the IoU
    (centerness) term is left out where there is no such branch.

    Source: Nguyen et al., "Improving Object Detection by Label Assignment
    Distillation", WACV 2022, https://arxiv.org/abs/2108.10520: the baseline,
    and the soft part of SoLAD. Of the official code's details: its class sum
    also runs over anchors on padding; A is not averaged over processes, and
    where it is 0 it divides by machine precision. Here it is averaged and at
    least 1.

    Args:
        cls_weight: :math:`w_{cls}`.
        iou_weight: :math:`w_{iou}`.
        box_weight: :math:`w_{box}`.
        min_iou: Threshold of V, from 0 to 1.
        gamma: Exponent of FKL's focusing factor.
        loss_weight: Weight of the whole.

    Raises:
        ConfigError: If an option is outside its range or the pair of
            detectors does not fit.
    """

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

    def prepare(self, student: Outputs, teacher: Outputs) -> None:
        name = type(self).__name__
        heads = [dense_head(o, name) for o in (student, teacher)]
        for head in heads:
            coder = getattr(head, 'bbox_coder', None)
            if not (
                getattr(head, 'use_sigmoid_cls', False)
                and hasattr(coder, 'means')
            ):
                raise ConfigError(
                    f'{name} fits sigmoid heads with anchors and box deltas '
                    f'(PAA, ATSS, DDOD, RetinaNet), got {type(head).__name__}'
                )
        check_same_priors(heads[0], heads[1], name, shapes=True)

    def forward(
        self,
        student: Outputs,
        teacher: 'TeacherOutputs',
        data_samples: Sequence[DetDataSample],
    ) -> dict[str, Tensor]:
        ours, theirs = student.raw('bbox_head'), teacher.dense
        head, teacher_head = student.model.bbox_head, teacher.model.bbox_head
        logits, deltas = flat_predictions(head, ours)
        teacher_logits, teacher_deltas = flat_predictions(teacher_head, theirs)
        anchors, valid = _anchors(head, ours[0], data_samples)
        boxes = head.bbox_coder.decode(anchors, deltas.float())
        with torch.no_grad():
            teacher_boxes = teacher_head.bbox_coder.decode(
                anchors, teacher_deltas.float()
            )
            overlap = best_overlap(teacher_boxes, data_samples) * valid
            overlap = overlap * (overlap > self.min_iou)
            average = reduce_mean(overlap.sum()).clamp(min=1)
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
        if len(ours) > 2 and len(theirs) > 2:
            ious = [flatten_levels(o[2], 1)[..., 0] for o in (ours, theirs)]
            losses['soft_iou'] = self.iou_weight * (
                self.divergence(*ious) * (overlap > 0)
            )
        return {name: loss.sum() / average for name, loss in losses.items()}


@METHODS.register_module()
class SoLAD(LabelAssignmentDistillation):
    """SoLAD: LAD and soft labels together.

    :class:`LabelAssignmentDistillation` for the assignment, beside
    :class:`SoftLabelDistillation` with the weights below.

    Source: Nguyen et al., "Improving Object Detection by Label Assignment
    Distillation", WACV 2022, https://arxiv.org/abs/2108.10520; weights of its
    official code.

    Args:
        soft: Options of :class:`SoftLabelDistillation` other than these
            defaults: ``cls_weight=2, min_iou=0.5``.
        box_weighting: See :class:`LabelAssignmentDistillation`.
        keep_single: See :class:`LabelAssignmentDistillation`.
        loss_weight: Weight of the soft labels; 0 switches all off.
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

    def prepare(self, student: Outputs, teacher: Outputs) -> None:
        super().prepare(student, teacher)
        self.soft.prepare(student, teacher)

    def forward(
        self,
        student: Outputs,
        teacher: 'TeacherOutputs',
        data_samples: Sequence[DetDataSample],
    ) -> dict[str, Tensor]:
        losses = self.soft(student, teacher, data_samples)
        return {k: self.soft.loss_weight * v for k, v in losses.items()}


def _anchors(
    head: Any, maps: Sequence[Tensor], data_samples: Sequence[DetDataSample]
) -> tuple[Tensor, Tensor]:
    """The anchors (B, N, 4) and whether they lie on each image (B, N)."""
    anchors, flags = head.get_anchors(
        [level.shape[-2:] for level in maps],
        [sample.metainfo for sample in data_samples],
        device=maps[0].device,
    )
    return (
        torch.cat(anchors[0]).expand(len(anchors), -1, -1),
        torch.stack([torch.cat(levels) for levels in flags]),
    )


def best_overlap(
    boxes: Tensor, data_samples: Sequence[DetDataSample]
) -> Tensor:
    """The largest IoU of each box with an object of its image.

    Args:
        boxes: (B, N, 4), xyxy in pixels.
        data_samples: B, with their objects.

    Returns:
        (B, N), 0 in an image without objects.
    """
    objects = [sample.gt_instances.bboxes for sample in data_samples]
    most = max(1, *map(len, objects)) if objects else 1
    padded = boxes.new_zeros(len(objects), most, 4)
    for row, gt in zip(padded, objects, strict=True):
        row[: len(gt)] = gt if isinstance(gt, Tensor) else gt.tensor
    return bbox_overlaps(boxes, padded).amax(2)
