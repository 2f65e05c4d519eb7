"""Label-assignment distillation (LAD)."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from mmdet.models.utils import unpack_gt_instances
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor

from mmkd.core.method import Method
from mmkd.detectors.assignment.fit import (
    check_all_classes_known,
    check_dynamic,
    dense_head,
    is_paa,
)
from mmkd.detectors.assignment.paa import (
    Candidates,
    assigned_by,
    check_stock_paa,
    flat_predictions,
)
from mmkd.detectors.assignment.replay import record_assignments, replayed
from mmkd.detectors.record import Outputs, replaced
from mmkd.errors import ConfigError
from mmkd.registry import METHODS

if TYPE_CHECKING:
    from mmkd.teachers.class_map import ClassMap
    from mmkd.teachers.frozen_view import TeacherOutputs

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
    Distillation", WACV 2022, https://arxiv.org/abs/2108.10520, for PAA
    (official code: CoLAD). The extension to other assigners is mmkd's.

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
        self.check_choice(BOX_WEIGHTINGS, box_weighting=box_weighting)
        self.check_choice(QUALITIES, quality=quality)
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
