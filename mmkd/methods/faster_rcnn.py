"""Faster R-CNN distillation (Chen et al., NeurIPS 2017)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.registry import Registry
from torch import Tensor

from mmkd.core.method import Method, Need
from mmkd.data.batch import Batch
from mmkd.detectors.facts import RoIFacts, same_coder
from mmkd.detectors.record import RoIOutputs, StepRecord
from mmkd.detectors.two_stage import (
    check_same_anchors,
    check_same_classifiers,
    check_two_stage,
    deltas_of_label,
)
from mmkd.errors import ConfigError
from mmkd.registry import METHODS, MODELS
from mmkd.teachers.class_map import ClassMap
from mmkd.teachers.view import FEATURES, ROIS, RPN, TeacherView
from mmkd.utils import build_checked

from .feature_hint import FeatureHint

SOFT = {'type': 'mmkd.WeightedSoftCrossEntropyLoss', 'background_weight': 1.5}
BOUNDED = {
    'type': 'mmkd.TeacherBoundedRegressionLoss',
    'margin': 0.0,
    'loss_weight': 0.5,
}
HINT = {'type': 'mmkd.FeatureHint', 'loss_weight': 0.5}


@METHODS.register_module()
class FasterRCNNDistillation(Method):
    r"""Distils RPN, RoI head and features of a two-stage detector.

    .. math::
        L &= L_{RPN} + L_{RCN} + \gamma L_{hint} \\
        L_{cls} &= \mu L_{hard} + (1 - \mu) L_{soft} \\
        L_{reg} &= \lambda (L_{stock} + \nu L_b)

    for both the RPN and the RCN (the RoI head), averaged over the sampled
    boxes of all processes. :math:`L_{hard}` and :math:`L_{stock}` are the
    student's own losses, which the method scales; :math:`L_{soft}` is
    :class:`~mmkd.losses.WeightedSoftCrossEntropyLoss`, :math:`L_b` is
    :class:`~mmkd.losses.TeacherBoundedRegressionLoss` on the positives; and
    :math:`L_{hint}` is :class:`FeatureHint`.

    The RPN is distilled on the student's sampled anchors, and the RoI head on
    the student's sampled RoIs, which the teacher scores on its own features.
    (The paper does not say so, but only then do both see the same box.) Each
    stage of a cascade is distilled from the same stage of the teacher, or
    from its last if it has fewer, with the student's own stage weight.

    The method fits Faster, Mask (its box part), Cascade and Double-Head R-CNN
    with FPN or C4, softmax or sigmoid heads, class-agnostic or class-specific
    regression, and box coders that differ: the teacher's deltas are decoded
    and encoded again. Only what is distilled has to fit: ``rpn=False`` takes
    proposals from anywhere (Fast R-CNN, guided anchors, Cascade RPN), and
    ``bounded=None`` takes box targets of any kind (SABL's RoI head, with
    ``lambda_reg`` 1). A sigmoid classifier is the two-class case of the same
    formula, column by column. Where class sets differ, RoI probabilities are
    renormalised over the shared classes and the background, and boxes of
    classes that the teacher does not know get no bounded loss.

    Source: Chen, Choi, Yu, Han, Chandraker, "Learning Efficient Object
    Detection Models with Knowledge Distillation", NeurIPS 2017,
    https://papers.nips.cc/paper/2017/hash/e1e32e235eee1f970470a3a6658dfdd5-Abstract.html,
    with :math:`\lambda = 1, \gamma = \nu = 0.5`. The paper gives no
    :math:`\mu` (here 0.5) and no margin (here 0). There is no official code.

    Args:
        mu: Share of the hard labels in the classification loss, 0 to 1.
        lambda_reg: Factor of the regression loss, at least 0.
        soft: Config of the soft classification loss; None keeps only the
            hard loss.
        bounded: Config of the bounded regression loss, or None.
        hint: Config of the :class:`FeatureHint`, or None.
        rpn: Distil the RPN.
        rcn: Distil the RoI head.
        loss_weight: Weight of the whole method. At 0 the student's losses
            are stock, at 1 they are the formula above, and in between they
            change linearly.

    Raises:
        ConfigError: If an option is outside its range or the pair of
            detectors does not fit.
    """

    needs: Sequence[Need] = (RPN, ROIS, FEATURES)
    without: Mapping[str, str] = {
        RPN: 'rpn=False',
        ROIS: 'rcn=False',
        FEATURES: 'hint=None',
    }

    def __init__(
        self,
        *,
        mu: float = 0.5,
        lambda_reg: float = 1.0,
        soft: Mapping[str, Any] | None = SOFT,
        bounded: Mapping[str, Any] | None = BOUNDED,
        hint: Mapping[str, Any] | None = HINT,
        rpn: bool = True,
        rcn: bool = True,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        self.check_option(0 <= mu <= 1, 'mu', mu, 'between 0 and 1')
        self.check_not_negative(lambda_reg=lambda_reg)
        if not (rpn or rcn) and (soft or bounded):
            raise ConfigError(
                'FasterRCNNDistillation with rpn=False and rcn=False has no '
                'use for soft and bounded: set them to None, or use '
                'mmkd.FeatureHint alone.'
            )
        if soft is None and bounded is None and hint is None:
            raise ConfigError(
                'FasterRCNNDistillation has nothing to do: soft, bounded and '
                'hint are all None.'
            )
        self.mu, self.lambda_reg = mu, lambda_reg
        self.soft = _build(MODELS, soft, 'soft')
        self.bounded = _build(MODELS, bounded, 'bounded')
        self.hint: FeatureHint | None = _build(METHODS, hint, 'hint')
        if getattr(self.soft, 'use_sigmoid', False):
            raise ConfigError(
                'FasterRCNNDistillation.soft: use_sigmoid=True does not '
                'belong in a config, because the method looks at each head. '
                'Leave it out.'
            )
        self.rpn = rpn and bool(soft or bounded)
        self.rcn = rcn and bool(soft or bounded)
        used = {RPN: self.rpn, ROIS: self.rcn, FEATURES: bool(hint)}
        self.needs = tuple(need for need, is_read in used.items() if is_read)

    @property
    def student_paths(self) -> Sequence[str]:
        return self.hint.student_paths if self.hint else ()

    @property
    def teacher_paths(self) -> Sequence[str]:
        return self.hint.teacher_paths if self.hint else ()

    def prepare(self, student: StepRecord, teacher: TeacherView) -> None:
        facts, others = student.facts, teacher.facts
        for role, each in (('student', facts), ('teacher', others)):
            check_two_stage(
                each,
                role,
                type(self).__name__,
                rpn=self.rpn,
                rcn=self.rcn,
                deltas=bool(self.bounded) or self.lambda_reg != 1,
            )
        if self.rpn:
            assert facts.rpn is not None
            assert others.rpn is not None
            check_same_anchors(facts.rpn, others.rpn)
        if self.rcn and self.soft:
            check_same_classifiers(facts, others)
        if self.hint:
            self.hint.prepare(student, teacher)

    def task_factors(self) -> Mapping[str, float]:
        factors = {}
        for distilled, prefix in (
            (self.rpn, r'loss_rpn_'),
            (self.rcn, r'(s\d+\.)?loss_'),
        ):
            if distilled:
                factors[f'{prefix}bbox'] = self.lambda_reg
            if distilled and self.soft:
                factors[f'{prefix}cls'] = self.mu
        return factors

    def forward(
        self, student: StepRecord, teacher: TeacherView, batch: Batch
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        if self.rpn:
            losses |= self._rpn_losses(student.anchors, teacher)
        if self.rcn:
            for stage in range(len(student.rois)):
                losses |= self._rcn_losses(student, teacher, stage)
        if self.hint:
            losses |= self.hint(student, teacher, batch)
        return losses

    def _rpn_losses(
        self, sample: RoIOutputs, teacher: TeacherView
    ) -> dict[str, Tensor]:
        assert sample.logits is not None
        assert sample.deltas is not None
        scores = teacher.score_anchors(sample)
        losses = {}
        if self.soft:
            losses['rpn_soft'] = (1 - self.mu) * self.soft(
                _object_or_not(sample.logits),
                _object_or_not(scores.logits),
                sample.label_weights,
                sample.number,
            )
        if self.bounded:
            assert scores.deltas is not None
            losses['rpn_bounded'] = self.lambda_reg * self._bounded_loss(
                sample,
                sample.deltas,
                scores.deltas,
                scores.coder,
                sample.target_weights,
            )
        return losses

    def _rcn_losses(
        self, student: StepRecord, teacher: TeacherView, stage: int
    ) -> dict[str, Tensor]:
        sample, classes = student.rois[stage], teacher.class_map
        scores = teacher.score_rois(sample, stage)
        name, scale = 'rcn', student.facts.rois[stage].weight
        if len(student.facts.rois) > 1:
            name = f's{stage}_rcn'
        losses = {}
        if self.soft and sample.logits is not None:
            losses[f'{name}_soft'] = (scale * (1 - self.mu)) * self._rcn_soft(
                sample, sample.logits, scores.logits, classes
            )
        if (
            self.bounded
            and sample.deltas is not None
            and scores.deltas is not None
        ):
            labels, known = _teacher_labels(sample.labels, classes)
            bounded = self._bounded_loss(
                sample,
                deltas_of_label(sample.deltas, sample.labels),
                deltas_of_label(scores.deltas, labels),
                scores.coder,
                sample.target_weights * known[:, None],
            )
            losses[f'{name}_bounded'] = (scale * self.lambda_reg) * bounded
        return losses

    def _rcn_soft(
        self,
        sample: RoIOutputs,
        ours: Tensor,
        theirs: Tensor,
        classes: ClassMap,
    ) -> Tensor:
        if not classes.identical:
            ours = _with_background(ours, classes.student_index)
            theirs = _with_background(theirs, classes.teacher_index)
        assert isinstance(sample.facts, RoIFacts)
        if not sample.facts.sigmoid:
            return self.soft(ours, theirs, sample.label_weights, sample.number)
        # Each column is a two-class problem, and they are summed. The "class"
        # of the last column is the background itself, so its two outcomes
        # change places.
        columns = ours.shape[1]
        ours, theirs = (
            torch.cat([z[:, :-1], -z[:, -1:]], 1).reshape(-1, 1)
            for z in (ours, theirs)
        )
        zeros = torch.zeros_like(ours)
        weights = sample.label_weights.repeat_interleave(columns)
        return self.soft(
            torch.cat([ours, zeros], 1),
            torch.cat([theirs, zeros], 1),
            weights,
            sample.number,
        )

    def _bounded_loss(
        self,
        sample: RoIOutputs,
        deltas: Tensor,
        teacher_deltas: Tensor,
        teacher_coder: Any,
        weights: Tensor,
    ) -> Tensor:
        boxes = sample.boxes[:, -4:]
        deltas, teacher_deltas = deltas.float(), teacher_deltas.float()
        coder = sample.facts.coder
        if not same_coder(coder, teacher_coder):
            decoded = teacher_coder.decode(boxes, teacher_deltas)
            teacher_deltas = coder.encode(boxes, decoded)
        targets = sample.targets
        if sample.facts.decoded_targets:
            targets = coder.encode(boxes, targets)
        # The background has no target box, and its own may be empty. Encoding
        # either gives infinity, which not even a weight of 0 makes 0.
        positive, own = weights > 0, deltas.detach()
        return self.bounded(
            deltas,
            torch.where(positive, targets, own),
            torch.where(positive, teacher_deltas, own),
            weights,
            sample.number,
        )


def _build(registry: Registry, cfg: Any, option: str) -> Any:
    if cfg is None:
        return None
    return build_checked(registry, cfg, f'FasterRCNNDistillation.{option}')


def _object_or_not(logits: Tensor) -> Tensor:
    """Return RPN logits as logits of (object, background).

    A sigmoid's single logit z becomes (z, 0), whose softmax is the same.
    """
    if logits.shape[1] > 1:
        return logits
    return torch.cat([logits, torch.zeros_like(logits)], dim=1)


def _with_background(logits: Tensor, index: Tensor) -> Tensor:
    return torch.cat([logits[:, index], logits[:, -1:]], dim=1)


def _teacher_labels(
    labels: Tensor, classes: ClassMap
) -> tuple[Tensor, Tensor]:
    """Return the teacher's labels (N,) and whether it knows them (N,)."""
    if classes.identical:
        return labels, torch.ones_like(labels)
    mapped = classes.to_teacher[labels]
    return mapped.clamp(min=0), (mapped >= 0).to(labels)
