"""Label-assignment distillation: LAD, SoLAD and soft labels."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from mmdet.models.losses import GIoULoss
from mmdet.models.utils import unpack_gt_instances
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from mmdet.utils import reduce_mean
from mmengine.structures import InstanceData
from torch import Tensor

from mmkd.assignment.paa import (
    Candidates,
    assigned_by,
    check_stock_paa,
    flat_predictions,
)
from mmkd.assignment.replay import (
    reads_predictions,
    record_assignments,
    replayed,
    same_priors,
)
from mmkd.losses import FocalKLLoss
from mmkd.outputs import Outputs, flatten_levels, replaced
from mmkd.registry import METHODS
from mmkd.utils import ConfigError

from .base import Method

if TYPE_CHECKING:
    from mmkd.teacher import ClassMap, TeacherOutputs

FITTING = (
    'heads whose assignment reads predictions: PAA, TOOD, RTMDet, YOLOX, '
    'DDOD, and any with an assigner that is given boxes and scores'
)
BOX_WEIGHTINGS = ('iou', 'none')
QUALITIES = ('student', 'teacher')


@METHODS.register_module()
class LabelAssignmentDistillation(Method):
    r"""LAD: the teacher decides which priors are trained on which object.

    The teacher's head assigns the ground truth by *its own* predictions; the
    student's stock loss trains on that assignment. There is no other loss:
    the teacher's scores and boxes are not imitated.

    * PAA: the costs of the candidates, from which a mixture of two Gaussians
      separates the positives, are the teacher's: focal + GIoU loss of its
      predictions. The pre-assignment by IoU is the student's own.
    * Other heads (TOOD, RTMDet, YOLOX, DDOD): the teacher's assigner runs on
      the teacher's predictions. Where the assignment carries a soft quality
      target (IoU, alignment), *which* priors are positive comes from the
      teacher and the quality from the student's own boxes. TOOD's static
      assigner of the first epochs is left out: it stands in for predictions
      that are not yet any good, and the teacher's are.

    Both heads need the same priors (strides, anchors a position); class
    names are mapped, and the teacher has to know each of the student's.

    Source: Nguyen et al., "Improving Object Detection by Label Assignment
    Distillation", WACV 2022, for PAA (official code: CoLAD). The extension
    to other assigners is mmkd's.

    Args:
        box_weighting: PAA only. ``'iou'``: the stock loss, GIoU weighted by
            each box' IoU over the sum of these; ``'none'``: as in the
            official code, GIoU over the number of positives.
        quality: ``'student'``, or ``'teacher'`` for the soft targets of the
            teacher's boxes.
        keep_single: PAA only: an object's only candidate is positive, as in
            the official code; MMDetection leaves such an object without.
        loss_weight: 0 switches the method off, every other value on.

    Raises:
        ConfigError: If an option is unknown, or the pair does not fit.
    """

    def __init__(
        self,
        *,
        box_weighting: str = 'iou',
        quality: str = 'student',
        keep_single: bool = False,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        for option, value, known in (
            ('box_weighting', box_weighting, BOX_WEIGHTINGS),
            ('quality', quality, QUALITIES),
        ):
            if value not in known:
                raise ConfigError(
                    f'{type(self).__name__}.{option} must be one of '
                    f'{", ".join(known)}, got {value!r}'
                )
        self.box_weighting, self.quality = box_weighting, quality
        self.keep_single = keep_single

    def prepare(self, student: Outputs, teacher: Outputs) -> None:
        name = type(self).__name__
        heads = [dense_head(o, name) for o in (student, teacher)]
        if is_paa(heads[0]) != is_paa(heads[1]):
            raise ConfigError(
                f'{name}: the student assigns by {type(heads[0]).__name__}, '
                f'the teacher by {type(heads[1]).__name__}. Give both the '
                'same kind of head.'
            )
        if is_paa(heads[0]):
            check_stock_paa(heads[0], name)
        elif self.box_weighting != 'iou':
            raise ConfigError(
                f'{name}.box_weighting is for PAA; leave it out for '
                f'{type(heads[0]).__name__}.'
            )
        check_dynamic(student, teacher, name)

    @contextmanager
    def guide(
        self,
        student: Outputs,
        teacher: 'TeacherOutputs',
        data_samples: Sequence[DetDataSample],
    ) -> Iterator[None]:
        classes = teacher.class_map
        check_all_classes_known(classes, type(self).__name__)
        head = student.model.bbox_head
        teacher_head = teacher.model.bbox_head
        with ExitStack() as stack:
            if is_paa(head):
                costs = functools.partial(
                    _teacher_costs, teacher_head, teacher.dense, classes
                )
                stack.enter_context(
                    assigned_by(head, costs, keep_single=self.keep_single)
                )
                if self.box_weighting == 'none':
                    stack.enter_context(unweighted_boxes(head))
            else:
                recorded = record_assignments(
                    teacher_head,
                    teacher.dense,
                    *ground_truth(data_samples, classes),
                )
                stack.enter_context(
                    replayed(head, recorded, quality=self.quality)
                )
            yield


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

    Source: the baseline and the soft part of SoLAD in Nguyen et al., WACV
    2022. Of the official code's details: its class sum also runs over
    anchors on padding; A is not averaged over processes, and where it is 0
    it divides by machine precision. Here it is averaged and at least 1.

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
        if not 0 <= min_iou < 1:
            raise ConfigError(
                f'{type(self).__name__}.min_iou must be at least 0 and below '
                f'1, got {min_iou}'
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
        check_same_priors(student, teacher, name)

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

    Source: Nguyen et al., WACV 2022; weights of its official code.

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


def is_paa(head: Any) -> bool:
    """Whether a head separates candidates by their costs."""
    return hasattr(head, 'paa_reassign') and hasattr(head, 'get_pos_loss')


def dense_head(outputs: Outputs, method: str) -> Any:
    """The head of a one-stage detector.

    Raises:
        ConfigError: If the detector has none that loops over priors.
    """
    model = outputs.model
    head = getattr(model, 'bbox_head', None)
    if head is None or not hasattr(head, 'prior_generator'):
        raise ConfigError(
            f'{method} fits one-stage detectors with priors; '
            f'{type(model).__name__} has '
            f'{type(head).__name__ if head else "no bbox_head"}. It fits '
            f'{FITTING}.'
        )
    return head


def check_dynamic(student: Outputs, teacher: Outputs, method: str) -> None:
    """Check that both heads assign by predictions, and the same priors.

    Lets each assign one object of the blank image.

    Raises:
        ConfigError: If a head's assignment is static, or priors differ.
    """
    check_same_priors(student, teacher, method)
    if is_paa(student.model.bbox_head):
        return
    recorded = [_blank_assignment(outputs) for outputs in (student, teacher)]
    for role, outputs, record in zip(
        ('student', 'teacher'), (student, teacher), recorded, strict=True
    ):
        if not reads_predictions(record):
            raise ConfigError(
                f'{method}: the assignment of the {role} '
                f'({type(outputs.model.bbox_head).__name__}) is static, it '
                'does not read predictions, so there is nothing to distil. '
                f'It fits {FITTING}.'
            )
    if not same_priors(*recorded):
        raise ConfigError(
            f'{method}: the two heads assign different priors. Give both the '
            'same prior (anchor) generator and allowed_border.'
        )


def _blank_assignment(outputs: Outputs) -> Any:
    maps = outputs.raw('bbox_head')
    device = maps[0][0].device
    gt = InstanceData(
        bboxes=torch.tensor([[32.0, 32.0, 160.0, 160.0]], device=device),
        labels=torch.zeros(1, dtype=torch.long, device=device),
    )
    stride = outputs.model.bbox_head.prior_generator.strides[0]
    size = tuple(
        n * s for n, s in zip(maps[0][0].shape[-2:], stride[::-1], strict=True)
    )
    meta = dict(img_shape=size, pad_shape=size, batch_input_shape=size)
    try:
        return record_assignments(outputs.model.bbox_head, maps, [gt], [meta])
    except (AttributeError, TypeError):  # a head with other losses
        return {}


def check_same_priors(student: Outputs, teacher: Outputs, method: str) -> None:
    """Check that both heads predict at the same priors.

    Raises:
        ConfigError: If strides or priors at a position differ.
    """
    generators = [
        o.model.bbox_head.prior_generator for o in (student, teacher)
    ]
    ours, theirs = (
        generator.grid_priors(
            [level.shape[-2:] for level in outputs.raw('bbox_head')[0]],
            device=outputs.raw('bbox_head')[0][0].device,
        )
        for generator, outputs in zip(
            generators, (student, teacher), strict=True
        )
    )
    if len(ours) != len(theirs) or any(
        a.shape != b.shape or not torch.allclose(a, b)
        for a, b in zip(ours, theirs, strict=True)
    ):
        raise ConfigError(
            f"{method}: the student's priors (strides "
            f'{list(generators[0].strides)}, '
            f'{generators[0].num_base_priors} a position) are not the '
            f"teacher's (strides {list(generators[1].strides)}, "
            f'{generators[1].num_base_priors} a position, or other shapes). '
            'Give both the same prior (anchor) generator.'
        )


def check_all_classes_known(classes: 'ClassMap', method: str) -> None:
    """Check that the teacher can judge each of the student's objects.

    Raises:
        ConfigError: If it does not know a class.
    """
    if len(classes.shared) < len(classes.student):
        unknown = [n for n in classes.student if n not in classes.teacher]
        raise ConfigError(
            f'{method}: the teacher has to assign every object, but does not '
            f'know {", ".join(unknown)}. Use a teacher of these classes.'
        )


def ground_truth(
    data_samples: Sequence[DetDataSample], classes: 'ClassMap'
) -> tuple[list[InstanceData], list[dict], list[InstanceData | None]]:
    """Objects with the teacher's labels, meta data, regions to ignore."""
    objects, ignored, metas = unpack_gt_instances(data_samples)
    if not classes.identical:
        objects = [gt.clone() for gt in objects]
        for gt in objects:
            gt.labels = classes.to_teacher[gt.labels]
    return objects, metas, ignored


def _teacher_costs(
    head: Any,
    outputs: Any,
    classes: 'ClassMap',
    candidates: Candidates,
    *_: Tensor,
) -> Tensor:
    """The costs of a PAA student's candidates in the eyes of a teacher."""
    labels = candidates.labels
    if not classes.identical:
        labels = classes.to_teacher[labels]
    return candidates.costs(head, *flat_predictions(head, outputs), labels)


@contextmanager
def unweighted_boxes(head: Any) -> Iterator[None]:
    """Let a PAA head divide its plain box loss by the number of positives."""
    forward = head.loss_bbox.forward

    def unweighted(
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        return forward(pred, target, None, len(pred), **options)

    with replaced(head.loss_bbox, 'forward', unweighted):
        yield


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
