"""Label-assignment distillation (LAD)."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from mmdet.models.utils import unpack_gt_instances
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor

from mmkd.core.method import Method
from mmkd.data.batch import Batch
from mmkd.detectors.assignment.fit import (
    check_dynamic,
    dense_facts,
    is_paa,
)
from mmkd.detectors.assignment.paa import (
    Candidates,
    assigned_by,
    check_stock_paa,
    unweighted_boxes,
)
from mmkd.detectors.assignment.replay import record_assignments, replayed
from mmkd.detectors.dense import DenseOutputs, student_dense
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError
from mmkd.registry import METHODS
from mmkd.teachers.class_map import ClassMap
from mmkd.teachers.view import DENSE, NETWORK, TeacherView
from mmkd.utils import Official

BOX_WEIGHTINGS = ('iou', 'none')
QUALITIES = ('student', 'teacher')
CODE = 'https://github.com/cybercore-co-ltd/CoLAD'
"""The authors' code of LAD, SoLAD, soft labels and CoLAD."""


@METHODS.register_module(name=['LAD', 'LabelAssignmentDistillation'])
class LAD(Method):
    r"""LAD: the teacher decides which priors are trained on which object.

    The teacher's head assigns the ground truth by *its own* predictions, and
    the student's stock loss trains on that assignment. There is no other
    loss: the teacher's scores and boxes are not imitated.

    * In PAA, a mixture of two Gaussians separates the positives by the costs
      of the candidates. These costs are the teacher's: the focal and GIoU
      loss of its predictions. The pre-assignment by IoU is the student's own.
    * In other heads (TOOD, RTMDet, YOLOX, DDOD), the teacher's assigner runs
      on the teacher's predictions. Where the assignment carries a soft
      quality target (IoU, alignment), the teacher decides *which* priors are
      positive, and the quality comes from the student's own boxes. TOOD's
      static assigner of the first epochs is left out, because it replaces
      predictions that are not good yet, and the teacher's are.

    Both heads need the same priors (strides, anchors per position). Class
    names are mapped, and the teacher has to know all of the student's.

    Source: Nguyen et al., "Improving Object Detection by Label Assignment
    Distillation", WACV 2022, https://arxiv.org/abs/2108.10520, for PAA
    (official code: cybercore-co-ltd/CoLAD). The extension to other assigners
    is mmkd's. Regions that are marked as ignored reach the assignment; in the
    official code they do not.

    Args:
        box_weighting: For PAA only. ``'iou'`` is the stock loss, in which
            each GIoU is weighted by the IoU of its box, over the sum of these
            weights. ``'none'`` is the official code, in which GIoU is divided
            by the number of positives.
        quality: ``'student'``, or ``'teacher'`` for the soft targets of the
            teacher's boxes.
        keep_single: For PAA only. Make an object's only candidate positive.
            MMDetection and the official code give such an object no
            positive; only a base class in that code, which LAD and CoLAD
            override, keeps it.
        loss_weight: 0 switches the method off, and any other value on.

    Raises:
        ConfigError: If an option is unknown, or the pair does not fit.
    """

    needs = (DENSE, NETWORK)
    steers = True
    official = tuple(
        Official(
            code=CODE,
            compared='tests/methods/test_lad.py::TestOfficialCode',
            options=dict(
                box_weighting='none', quality='student', keep_single=False
            ),
            config=config,
            ap=ap,
        )
        for config, ap in (
            ('lad_r50.py', 'PAA R101→R50, 1x: 40.4→41.6'),
            ('lad_r101.py', 'PAA R50→R101, 1x: 42.6→43.3'),
        )
    )

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

    def prepare(self, student: StepRecord, teacher: TeacherView) -> None:
        name = type(self).__name__
        own, other = (dense_facts(x.facts, name) for x in (student, teacher))
        if is_paa(own.head) != is_paa(other.head):
            raise ConfigError(
                f'{name}: the student assigns by {own.kind}, the teacher by '
                f'{other.kind}. Give both the same kind of head.'
            )
        if is_paa(own.head):
            check_stock_paa(own.head, name)
        elif self.box_weighting != 'iou':
            raise ConfigError(
                f'{name}.box_weighting is for PAA; leave it out for '
                f'{own.kind}.'
            )
        check_dynamic(student_dense(student), teacher.dense, name)

    @contextmanager
    def steer(
        self, student: StepRecord, teacher: TeacherView, batch: Batch
    ) -> Iterator[None]:
        classes = teacher.class_map
        check_all_classes_known(classes, type(self).__name__)
        head = dense_facts(student.facts, type(self).__name__).head
        with ExitStack() as stack:
            if is_paa(head):
                costs = functools.partial(
                    _teacher_costs, teacher.dense, classes
                )
                stack.enter_context(
                    assigned_by(head, costs, keep_single=self.keep_single)
                )
                if self.box_weighting == 'none':
                    stack.enter_context(unweighted_boxes(head))
            else:
                recorded = record_assignments(
                    teacher.dense.facts.head,
                    teacher.dense.raw,
                    *ground_truth(batch.copies(), classes),
                )
                stack.enter_context(
                    replayed(head, recorded, quality=self.quality)
                )
            yield


def ground_truth(
    data_samples: Sequence[DetDataSample], classes: ClassMap
) -> tuple[list[InstanceData], list[dict], list[InstanceData | None]]:
    """Return objects with the teacher's labels, meta data, ignored regions.

    Args:
        data_samples: The images, whose labels are changed.
        classes: The class map.
    """
    objects, ignored, metas = unpack_gt_instances(data_samples)
    if not classes.identical:
        for gt in objects:
            gt.labels = classes.to_teacher[gt.labels]
    return objects, metas, ignored


def _teacher_costs(
    dense: DenseOutputs, classes: ClassMap, candidates: Candidates, *_: Tensor
) -> Tensor:
    """Return the teacher's costs of a PAA student's candidates."""
    labels = candidates.labels
    if not classes.identical:
        labels = classes.to_teacher[labels]
    return candidates.costs_of(dense, labels)


def check_all_classes_known(classes: ClassMap, method: str) -> None:
    """Check that the teacher can judge each of the student's objects.

    Raises:
        ConfigError: If the teacher does not know a class.
    """
    if len(classes.shared) < len(classes.student):
        unknown = [n for n in classes.student if n not in classes.teacher]
        raise ConfigError(
            f'{method}: the teacher has to assign every object, but it does '
            f'not know {", ".join(unknown)}. Use a teacher of these classes.'
        )
