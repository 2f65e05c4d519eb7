"""Localization distillation (Zheng et al., CVPR 2022)."""

from collections.abc import Sequence

import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from mmdet.utils import reduce_mean
from torch import Tensor

from mmkd.core.method import Method
from mmkd.data.batch import Batch
from mmkd.detectors.dense import (
    DenseOutputs,
    DenseTargets,
    student_dense,
    student_targets,
)
from mmkd.detectors.dense_checks import (
    check_dense,
    check_is_dense,
    check_same_priors,
)
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError
from mmkd.losses.kl import softmax_kl
from mmkd.registry import METHODS
from mmkd.teachers.view import DENSE, TeacherView

VLR_FACTOR = 0.25
"""The official code divides the sum of the valuable region by 16, not by the
4 sides."""


@METHODS.register_module()
class LD(Method):
    r"""The distributions of box sides approach the teacher's.

    A head with DFL (GFL) predicts each of the four distances from a prior to
    the sides of its box as a distribution over :math:`n + 1` bins. With
    :math:`D_i = \frac{T^2}{4 (n + 1)} \sum_{sides}
    \mathrm{KL}(p^t \| p^s)`,

    .. math::
        L_{main} &= w \sum_{i \in pos} s_i D_i, \qquad
        s_i = \max_c \sigma(z^s_{i,c}) \\
        L_{VLR} &= \frac{w_{VLR}}{4} \sum_{i \in VLR} u_i D_i, \qquad
        u_i = \max_{j : i \in VLR_j} \mathrm{IoU}_{ij}

    The main region is made of the student's positives. The valuable
    localization region of object j is made of the anchors with
    :math:`\gamma \alpha_j \le \mathrm{DIoU}_{ij} < \alpha_j`. Here
    :math:`\alpha_j` is ATSS' threshold: the mean plus the standard deviation
    of the IoU of the ``topk`` anchors of each level whose centres are
    nearest.

    The sums are those of the official code. They grow with the number of
    objects in the batch of a process (its configs have 2 or 3 images of
    COCO). With ``normalize``, the sum of each region (without the 1/4) is
    divided by its sum of weights, averaged over the processes, as GFL's own
    DFL loss is; w then has to be about 100 times larger.

    Localization does not depend on classes, so the networks' may differ.

    Source: Zheng et al., "Localization Distillation for Dense Object
    Detection", CVPR 2022, https://arxiv.org/abs/2102.12252, and its code
    (HikariTJU/LD). The weights :math:`s_i` and :math:`u_i`, the mean over
    bins, the factor 1/4 of the valuable region and the missing normaliser
    come from the code; the paper writes plain sums of the divergence. Its
    classification KD is :class:`KD`.

    Args:
        temperature: T, above 0.
        main_weight: w, at least 0.
        vlr_weight: :math:`w_{VLR}`, at least 0; 0 leaves the region out.
        gamma: Lower bound of the valuable region, 0 to 1.
        topk: Anchors per level for ATSS' threshold, at least 1.
        normalize: Divide by the sums of the weights.
        loss_weight: Weight of the method.

    Raises:
        ConfigError: If an option is outside its range, a head has no bins,
            or the two heads' bins or priors differ.
    """

    needs = (DENSE,)

    def __init__(
        self,
        *,
        temperature: float = 10.0,
        main_weight: float = 0.25,
        vlr_weight: float = 0.25,
        gamma: float = 0.25,
        topk: int = 9,
        normalize: bool = False,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        self.check_positive(temperature=temperature)
        self.check_not_negative(main_weight=main_weight, vlr_weight=vlr_weight)
        self.check_option(0 <= gamma <= 1, 'gamma', gamma, 'between 0 and 1')
        self.check_whole(1, topk=topk)
        self.temperature = temperature
        self.main_weight, self.vlr_weight = main_weight, vlr_weight
        self.gamma, self.topk = gamma, topk
        self.normalize = normalize

    def prepare(self, student: StepRecord, teacher: TeacherView) -> None:
        ours = check_dense(student, 'student', 'LD')
        check_is_dense(teacher.facts, 'teacher', 'LD')
        theirs = teacher.dense
        for role, dense in (('student', ours), ('teacher', theirs)):
            if dense.bins is None:
                raise ConfigError(
                    f'LD distils distributions of box sides (DFL); the '
                    f"{role}'s {dense.facts.kind} predicts none. "
                    'Use GFLHead in both networks.'
                )
        check_same_priors(ours.facts, theirs.facts, 'LD', centres=True)
        if ours.facts.reg_max != theirs.facts.reg_max:
            raise ConfigError(
                'LD: the distributions of box sides have different bins: '
                f'reg_max is {ours.facts.reg_max} in the student and '
                f'{theirs.facts.reg_max} in the teacher. Give both the same.'
            )
        if self.vlr_weight and not ours.facts.has_anchors:
            raise ConfigError(
                'LD: the valuable region needs anchors, but the student has '
                'points. Set vlr_weight=0.'
            )

    def forward(
        self,
        student: StepRecord,
        teacher: TeacherView,
        batch: Batch,
    ) -> dict[str, Tensor]:
        ours, theirs = student_dense(student), teacher.dense
        targets = student_targets(student, batch.data_samples)
        losses = {}
        if self.main_weight:
            scores = ours.logits[targets.index].detach().float().sigmoid()
            losses['main'] = self.main_weight * self._loss(
                ours, theirs, targets.index, scores.amax(-1)
            )
        if self.vlr_weight:
            weights = self._valuable(ours, targets, batch.data_samples)
            image, prior = weights.nonzero(as_tuple=True)
            losses['vlr'] = self.vlr_weight * self._loss(
                ours, theirs, (image, prior), weights[image, prior]
            )
            if not self.normalize:
                losses['vlr'] = VLR_FACTOR * losses['vlr']
        return losses

    def _loss(
        self,
        ours: DenseOutputs,
        theirs: DenseOutputs,
        index: tuple[Tensor, Tensor],
        weights: Tensor,
    ) -> Tensor:
        """Sum the weighted divergences of P priors; weights are (P,)."""
        assert ours.bins is not None
        assert theirs.bins is not None
        bins = ours.bins[index]
        divergence = softmax_kl(bins, theirs.bins[index], self.temperature)
        total = (weights[:, None] * divergence).sum() / (4 * bins.shape[-1])
        if self.normalize:
            total = total / reduce_mean(weights.sum()).clamp(min=1)
        return total

    @torch.no_grad()
    def _valuable(
        self,
        dense: DenseOutputs,
        targets: DenseTargets,
        data_samples: Sequence[DetDataSample],
    ) -> Tensor:
        """Return the weights of the valuable region, (B, N), 0 elsewhere."""
        level_sizes = [h * w for h, w in dense.sizes]
        return torch.stack(
            [
                valuable_region(
                    dense.priors,
                    valid,
                    level_sizes,
                    sample.gt_instances.bboxes,
                    gamma=self.gamma,
                    topk=self.topk,
                )
                for valid, sample in zip(
                    targets.weights > 0, data_samples, strict=True
                )
            ]
        )


def valuable_region(
    anchors: Tensor,
    valid: Tensor,
    level_sizes: Sequence[int],
    boxes: Tensor,
    *,
    gamma: float,
    topk: int,
) -> Tensor:
    """Return the weights of an image's anchors in the valuable region.

    Args:
        anchors: (N, 4) as xyxy, in pixels, level by level.
        valid: (N,) which of them lie in the image.
        level_sizes: The number of anchors in each level.
        boxes: (M, 4) the objects' boxes as xyxy, in pixels.
        gamma: Lower bound of the DIoU, as a share of ATSS' threshold.
        topk: Anchors per level that the threshold depends on.

    Returns:
        (N,) the largest IoU with an object whose region holds the anchor; 0
        for anchors in no region.
    """
    boxes = getattr(boxes, 'tensor', boxes)
    if len(boxes) == 0:
        return anchors.new_zeros(len(anchors))
    overlaps = bbox_overlaps(anchors, boxes)
    gap = _centres(anchors)[:, None] - _centres(boxes)
    distance = gap.square().sum(-1)
    hull = torch.max(anchors[:, None, 2:], boxes[:, 2:]) - torch.min(
        anchors[:, None, :2], boxes[:, :2]
    )
    diou = overlaps - distance / hull.square().sum(-1).clamp(min=1e-6)
    distance = distance.masked_fill(~valid[:, None], torch.inf)
    nearest, within = [], []
    for far, iou in zip(
        distance.split(level_sizes), overlaps.split(level_sizes), strict=True
    ):
        gaps, index = far.topk(min(topk, len(far)), dim=0, largest=False)
        nearest.append(iou.gather(0, index))
        within.append(gaps.isfinite())
    threshold = _mean_plus_std(torch.cat(nearest), torch.cat(within))
    valuable = (gamma * threshold <= diou) & (diou < threshold)
    valuable &= valid[:, None]
    return overlaps.where(valuable, 0.0).amax(-1)


def _centres(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _mean_plus_std(values: Tensor, chosen: Tensor) -> Tensor:
    """Return it for the chosen rows (L, M) of each column, (M,)."""
    count = chosen.sum(0)
    mean = values.where(chosen, 0.0).sum(0) / count.clamp(min=1)
    squares = (values - mean).where(chosen, 0.0).square().sum(0)
    return mean + (squares / (count - 1).clamp(min=1)).sqrt()
