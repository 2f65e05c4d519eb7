"""Soft labels of a dense head, alone and with LAD (SoLAD)."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from mmdet.models.losses import GIoULoss
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from mmengine.dist import get_world_size
from mmengine.logging import print_log
from torch import Tensor

from mmkd.core.method import Method
from mmkd.data.batch import Batch
from mmkd.detectors.assignment.fit import dense_facts
from mmkd.detectors.dense import (
    DenseOutputs,
    anchors_on_images,
    student_dense,
)
from mmkd.detectors.dense_checks import check_same_priors
from mmkd.detectors.record import (
    StepRecord,
    as_tensor,
    replaced,
    tensors_in,
)
from mmkd.errors import ConfigError
from mmkd.losses import FocalKLLoss
from mmkd.registry import METHODS
from mmkd.teachers.view import DENSE, TeacherView
from mmkd.utils import Official, process_share

from .class_logits import sum_over_priors
from .lad import CODE, LAD


@METHODS.register_module()
class SoftLabelDistillation(Method):
    r"""Soft labels of a dense head: classes, IoU branch and boxes.

    .. math::
        L = \frac{1}{A} \Big(
            w_{cls} \sum_{a, c} FKL(p^t_{ac}, p^s_{ac})
            + \sum_{a \in V} \big[ w_{iou} FKL(q^t_a, q^s_a)
            + w_{box} \, u_a \, (1 - GIoU(b^t_a, b^s_a)) \big] \Big),
        \quad A = \sum_{a \in V} u_a

    FKL is :class:`~mmkd.losses.FocalKLLoss`. Boxes are decoded from the
    anchors and clipped to the image (in pixels, without its padding), as in
    inference. :math:`u_a` is the largest IoU of the teacher's box with an
    object, and :math:`V` holds the anchors where it is above ``min_iou``, but
    none on padding. A is averaged over the processes. It is 1 in all of them
    together where it would be 0. The method fits sigmoid heads with anchors
    and a box coder (PAA, ATSS, DDOD, RetinaNet). The IoU (centerness) term is
    left out where there is no such branch.

    With ``task_loss=False`` the student trains by the soft labels alone: its
    own losses are neither computed nor logged while the method's weight is
    not 0, and nothing is assigned. Methods that read the assignment, such as
    :class:`~mmkd.methods.kd.KD`, then have nothing to read.

    Source: Nguyen et al., "Improving Object Detection by Label Assignment
    Distillation", WACV 2022, https://arxiv.org/abs/2108.10520: the baseline,
    and the soft part of SoLAD. The official code (cybercore-co-ltd/CoLAD)
    trains the baseline by soft labels alone, with the defaults here
    otherwise. It does not average A over the processes. It divides by 0 where
    A is 0, and fails on a batch without objects.

    Args:
        cls_weight: :math:`w_{cls}`.
        iou_weight: :math:`w_{iou}`.
        box_weight: :math:`w_{box}`.
        min_iou: Threshold of V, from 0 to 1.
        gamma: Exponent of FKL's focusing factor.
        task_loss: Whether the student's own losses train it as well. False
            is the baseline of the paper.
        ignore_padding: Whether the sum over the classes leaves out anchors on
            padding, so that it does not depend on the other images. In the
            official code they count.
        loss_weight: Weight of the method.

    Raises:
        ConfigError: If an option is outside its range or the pair of
            detectors does not fit.
    """

    needs = (DENSE,)
    steers = True  # of the class; an object with a task loss says False
    official = (
        Official(
            code=CODE,
            compared='tests/methods/test_solad.py::TestOfficialCode',
            options=dict(
                cls_weight=10.0,
                iou_weight=10.0,
                box_weight=1.3,
                min_iou=0.1,
                gamma=0.5,
                task_loss=False,
                ignore_padding=False,
            ),
            config='soft_label_r50.py',
            ap='PAA R101→R50, 1x: 40.4→41.3',
            differs=(
                'A is averaged over the processes; where it is 0, the '
                'official code divides by 0.'
            ),
        ),
    )

    def __init__(
        self,
        *,
        cls_weight: float = 10.0,
        iou_weight: float = 10.0,
        box_weight: float = 1.3,
        min_iou: float = 0.1,
        gamma: float = 0.5,
        task_loss: bool = True,
        ignore_padding: bool = False,
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
        self.check_choice(
            (True, False), task_loss=task_loss, ignore_padding=ignore_padding
        )
        self.cls_weight, self.iou_weight = cls_weight, iou_weight
        self.box_weight, self.min_iou = box_weight, min_iou
        self.task_loss, self.steers = task_loss, not task_loss
        self.ignore_padding = ignore_padding
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
        if not self.task_loss and self.loss_weight:
            head = heads[0].head
            own = [k for k, _ in head.named_children() if k[:5] == 'loss_']
            print_log(
                f'{name}: the student trains by soft labels alone. The own '
                f'losses of its {heads[0].kind} ({", ".join(own)}) are not '
                "computed while the method's weight is not 0.",
                'current',
            )

    def steer(
        self, student: StepRecord, teacher: TeacherView, batch: Batch
    ) -> AbstractContextManager[None]:
        if self.task_loss:
            return nullcontext()
        name = type(self).__name__
        student.note = f' {name} with task_loss=False leaves it out.'
        head = dense_facts(student.facts, name).head
        return replaced(head, 'loss_by_feat', lambda *_, **__: {})

    def forward(
        self, student: StepRecord, teacher: TeacherView, batch: Batch
    ) -> dict[str, Tensor]:
        own, other = student_dense(student), teacher.dense
        anchors, valid = anchors_on_images(own, batch.data_samples)
        boxes = decoded_on_images(own, anchors, batch.data_samples)
        with torch.no_grad():
            teacher_boxes = decoded_on_images(
                other, anchors, batch.data_samples
            )
            overlap = best_overlap(teacher_boxes, batch.data_samples) * valid
            overlap = overlap * (overlap > self.min_iou)
            average = process_share(overlap.sum())
            average = average.where(average > 0, 1 / get_world_size())
        shared = teacher.class_map

        def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
            if not shared.identical:
                ours = ours[:, shared.student_index]
                theirs = theirs[:, shared.teacher_index]
            return self.divergence(ours, theirs).sum(-1)

        weights = valid if self.ignore_padding else torch.ones_like(valid)
        soft = sum_over_priors(divergence, own, other, weights.float())
        apart = self.giou(boxes.flatten(0, 1), teacher_boxes.flatten(0, 1))
        losses = {
            'soft_cls': self.cls_weight * soft,
            'soft_bbox': self.box_weight * (apart * overlap.flatten()).sum(),
        }
        unread = own.raw[2:]
        if own.quality is not None and other.quality is not None:
            apart = self.divergence(own.quality, other.quality)
            total = (apart * (overlap > 0)).sum()
            losses['soft_iou'] = self.iou_weight * total
            unread = own.raw[3:]
        losses = {name: loss / average for name, loss in losses.items()}
        if not self.task_loss:
            losses['soft_cls'] = losses['soft_cls'] + nothing_of(unread)
        return losses


@METHODS.register_module()
class SoLAD(LAD):
    """SoLAD: LAD and soft labels together.

    It is :class:`LAD` for the assignment, together with
    :class:`SoftLabelDistillation` with the weights below.

    Source: Nguyen et al., "Improving Object Detection by Label Assignment
    Distillation", WACV 2022, https://arxiv.org/abs/2108.10520. The
    weights are those of its official code (cybercore-co-ltd/CoLAD), which
    also sets ``box_weighting='none'``.

    Args:
        soft: Options of :class:`SoftLabelDistillation` other than these
            defaults: ``cls_weight=2, min_iou=0.5``. ``task_loss`` is none of
            them, because LAD works by the student's own losses.
        box_weighting: See :class:`LAD`.
        keep_single: See :class:`LAD`.
        loss_weight: Weight of the soft labels; 0 also switches LAD off.

    Raises:
        ConfigError: If an option is unknown, or the pair does not fit.
    """

    official = (
        Official(
            code=CODE,
            compared='tests/methods/test_solad.py::TestOfficialCode',
            options=dict(soft=None, box_weighting='none', keep_single=False),
            config='solad_r50.py',
            ap='PAA R101→R50, 1x: 40.4→42.4',
            differs=SoftLabelDistillation.official[0].differs,
        ),
    )

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
        if not self.soft.task_loss:
            raise ConfigError(
                'SoLAD.soft has task_loss=False, but LAD works by the '
                "student's own losses. Leave it out, or use "
                'mmkd.SoftLabelDistillation.'
            )

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


def decoded_on_images(
    dense: DenseOutputs,
    anchors: Tensor,
    data_samples: Sequence[DetDataSample],
) -> Tensor:
    """Return a head's boxes, clipped to their images if its coder clips.

    Args:
        dense: The predictions for N anchors in each of B images.
        anchors: (B, N, 4), xyxy in pixels.
        data_samples: The B images, with their sizes.

    Returns:
        (B, N, 4), xyxy in pixels.
    """
    coder, deltas = dense.facts.coder, dense.regression
    assert deltas is not None
    boxes = coder.decode(anchors.flatten(0, 1), deltas.float().flatten(0, 1))
    boxes = as_tensor(boxes).view_as(anchors)
    if not getattr(coder, 'clip_border', True):
        return boxes
    sizes = [(*sample.img_shape[1::-1],) * 2 for sample in data_samples]
    limits = torch.tensor(sizes, dtype=boxes.dtype)
    limits = limits.to(boxes.device, non_blocking=True)[:, None]
    return boxes.clamp(torch.zeros_like(limits), limits)


def nothing_of(outputs: Any) -> Tensor | float:
    """Return a 0 through which every tensor within gets a gradient of 0.

    Distributed training waits for the gradient of every parameter. The
    values, which may be infinite, are not read.
    """
    return sum(x.flatten()[:0].sum() for x in tensors_in(outputs))


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
