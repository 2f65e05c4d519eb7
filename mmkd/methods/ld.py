"""Localization distillation (Zheng et al., CVPR 2022)."""

import warnings
from collections.abc import Sequence
from typing import ClassVar

import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from torch import Tensor

from mmkd.core.method import Method
from mmkd.data.batch import Batch
from mmkd.detectors.dense import (
    DenseOutputs,
    DenseTargets,
    assigned,
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
from mmkd.teachers.class_map import ClassMap
from mmkd.teachers.view import DENSE, TeacherView
from mmkd.utils import Official, process_share

from .class_logits import check_class_logits

CODE = 'https://github.com/HikariTJU/LD'
COMPARED = 'tests/methods/test_ld.py::TestOfficialCode'
VLR_FACTOR = 0.25
"""The official code divides the sum of the valuable region by 16, not by the
4 sides."""
NORMALISERS = ('images', True, False)
OFFICIAL_IMAGES = 2
"""The images of a process for which the default is the official form."""


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
    nearest. The DIoU is an overlap minus the squared distance of the centres,
    in squared diagonals of the hull. The paper's overlap is the IoU
    (``vlr_overlap='iou'``). In the official code it is the share of the
    *anchor* that lies in the object (``'iof'``, the default). It is never
    smaller: anchors that the IoU finds too far away come in, and small ones
    near the centre of a large object drop out.

    On unlabelled images, the objects of both regions are the teacher's
    confident detections.

    Localization does not depend on classes, so the networks' may differ. The
    paper's full method also distils the classes. ``kd_weight`` adds

    .. math::
        L_{KD} = w_{KD} \sum_{l} \frac{1}{N_l} \sum_{i \in pos_l}
            \frac{T_{KD}^2}{C} \, \mathrm{KL}(q^t_i \| q^s_i), \qquad
        q = \mathrm{softmax}(z / T_{KD})

    over the :math:`N_l` positives of each level l that has any (averaged over
    the processes, and at least 1 in all of them together). The softmax
    runs over the C classes that both networks have, although the head's
    classes are binary problems; positives of other classes are left out. With
    a single class there is nothing to compare, of which a warning tells.

    ``normalize`` says what the first two losses, which are sums over the
    batch, are divided by:

    * ``'images'``, the default: half the number of images. The loss is that
      of the official code with 2 images in a process, whatever the size of
      the batch and the number of processes.
    * False: nothing, as in the official code. The sums grow with the batch of
      a process (its configs have 2 or 3 images of COCO, and its README warns
      of more), and :math:`N_l` counts the positives of one process.
    * True: the sum of each region (without the 1/4) is divided by its sum of
      weights, averaged over the processes and at least 1 in all of them
      together, much as GFL does with its own DFL loss; w then has to be about
      100 times larger. Neither the official code nor MMDetection's LDHead
      divides LD's losses by it.

    Source: Zheng et al., "Localization Distillation for Dense Object
    Detection", CVPR 2022, https://arxiv.org/abs/2102.12252, and its code
    (HikariTJU/LD). The weights :math:`s_i` and :math:`u_i`, the mean over
    bins, the factor 1/4 of the valuable region, the missing normaliser and
    the form of the classes' KD come from the code; the paper writes plain
    sums of the divergence. Its GFL R50 gains 40.1 to 41.1 AP in the main
    region alone (``vlr_weight=0``) and 42.1 with all three losses
    (``kd_weight=10``). :class:`KD` is the form for all priors that fits
    binary problems.

    Args:
        temperature: T, above 0.
        main_weight: w, at least 0.
        vlr_weight: :math:`w_{VLR}`, at least 0; 0 leaves the region out.
        kd_weight: :math:`w_{KD}`, at least 0; 0 leaves the classes out. The
            official code has 10.
        kd_temperature: :math:`T_{KD}`, above 0.
        vlr_overlap: ``'iof'`` or ``'iou'``, the overlap in the DIoU.
        gamma: Lower bound of the valuable region, 0 to 1.
        topk: Anchors per level for ATSS' threshold, at least 1.
        normalize: What the losses of the boxes are divided by: ``'images'``,
            False for nothing, or True for the sums of the weights.
        loss_weight: Weight of the method.

    Raises:
        ConfigError: If an option is outside its range, a head has no bins,
            or the two heads' bins or priors differ.
    """

    official: ClassVar[Sequence[Official]] = (
        Official(
            code=CODE,
            compared=COMPARED,
            options=dict(
                temperature=10.0,
                main_weight=0.25,
                vlr_weight=0.25,
                vlr_overlap='iof',
                gamma=0.25,
                kd_weight=10.0,
                kd_temperature=2.0,
                normalize=False,
            ),
            config='ld_gfl_r50.py',
            ap='GFL R101→R50, 1x: 40.1→42.1 (main KD + main LD + VLR LD)',
        ),
        Official(
            code=CODE,
            compared=COMPARED,
            options=dict(
                temperature=10.0,
                main_weight=0.25,
                vlr_weight=0.0,
                kd_weight=0.0,
                normalize=False,
            ),
            config='ld_gfl_r50_main.py',
            ap='GFL R101→R50, 1x: 40.1→41.1 (main LD)',
        ),
    )

    needs = (DENSE,)
    needs_labels = False
    reads_objects = True

    def __init__(
        self,
        *,
        temperature: float = 10.0,
        main_weight: float = 0.25,
        vlr_weight: float = 0.25,
        kd_weight: float = 0.0,
        kd_temperature: float = 2.0,
        vlr_overlap: str = 'iof',
        gamma: float = 0.25,
        topk: int = 9,
        normalize: bool | str = 'images',
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        self.check_positive(
            temperature=temperature, kd_temperature=kd_temperature
        )
        self.check_not_negative(
            main_weight=main_weight, vlr_weight=vlr_weight, kd_weight=kd_weight
        )
        self.check_choice(('iof', 'iou'), vlr_overlap=vlr_overlap)
        self.check_option(0 <= gamma <= 1, 'gamma', gamma, 'between 0 and 1')
        self.check_whole(1, topk=topk)
        self.check_choice(NORMALISERS, normalize=normalize)
        self.temperature = temperature
        self.main_weight, self.vlr_weight = main_weight, vlr_weight
        self.kd_weight, self.kd_temperature = kd_weight, kd_temperature
        self.vlr_overlap, self.gamma, self.topk = vlr_overlap, gamma, topk
        self.per_image = normalize == 'images'
        self.normalize = bool(normalize)

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
        if self.kd_weight:
            check_class_logits(student, teacher, 'LD')
            _warn_of_one_class(teacher.class_map)

    def forward(
        self,
        student: StepRecord,
        teacher: TeacherView,
        batch: Batch,
    ) -> dict[str, Tensor]:
        ours, theirs = student_dense(student), teacher.dense
        targets = student_targets(student, batch.data_samples)
        # Those of `targets` leave out the padding, but ATSS looks into it.
        _, label_weights = assigned(ours, student.dense_targets)
        losses = {}
        if self.main_weight:
            scores = ours.logits[targets.index].detach().float().sigmoid()
            losses['main'] = self.main_weight * self._loss(
                ours, theirs, targets.index, scores.amax(-1)
            )
        if self.vlr_weight:
            weights = self._valuable(
                ours, label_weights > 0, batch.data_samples
            )
            image, prior = weights.nonzero(as_tuple=True)
            losses['vlr'] = self.vlr_weight * self._loss(
                ours, theirs, (image, prior), weights[image, prior]
            )
            if self.per_image or not self.normalize:
                losses['vlr'] = VLR_FACTOR * losses['vlr']
        if self.kd_weight and len(teacher.class_map.shared) > 1:
            losses['kd'] = self.kd_weight * self._class_loss(
                ours, theirs, targets, label_weights, teacher.class_map
            )
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
        if self.per_image:
            return total * OFFICIAL_IMAGES / len(ours.logits)
        if self.normalize:
            return total / process_share(weights.sum(), least=1)
        return total

    def _class_loss(
        self,
        ours: DenseOutputs,
        theirs: DenseOutputs,
        targets: DenseTargets,
        label_weights: Tensor,
        classes: ClassMap,
    ) -> Tensor:
        """Add up each level's mean divergence of the positives' classes."""
        logits, logits_t = (
            dense.logits[targets.index] for dense in (ours, theirs)
        )
        weights = label_weights[targets.index].float()
        known = torch.ones_like(weights)
        if not classes.identical:
            logits = logits[:, classes.student_index]
            logits_t = logits_t[:, classes.teacher_index]
            labels = targets.labels[targets.index]
            known = (classes.to_teacher[labels] >= 0).to(weights)
        divergence = softmax_kl(logits, logits_t, self.kd_temperature)
        ends = torch.tensor([h * w for h, w in ours.sizes]).cumsum(0)
        level = torch.bucketize(
            targets.index[1], ends.to(weights.device), right=True
        )
        count = weights.new_zeros(len(ends)).index_add(0, level, known)
        if self.normalize:
            count = process_share(count, least=1)
        else:
            count = count.clamp(min=1)
        weights = weights * known / count[level]
        return (weights * divergence).sum() / logits.shape[1]

    @torch.no_grad()
    def _valuable(
        self,
        dense: DenseOutputs,
        valid: Tensor,
        data_samples: Sequence[DetDataSample],
    ) -> Tensor:
        """Return the weights of the valuable region, (B, N), 0 elsewhere.

        ``valid`` is (B, N): which anchors the student's own loss assigns.
        """
        level_sizes = [h * w for h, w in dense.sizes]
        return torch.stack(
            [
                valuable_region(
                    dense.priors,
                    flags,
                    level_sizes,
                    sample.gt_instances.bboxes,
                    overlap=self.vlr_overlap,
                    gamma=self.gamma,
                    topk=self.topk,
                )
                for flags, sample in zip(valid, data_samples, strict=True)
            ]
        )


def _warn_of_one_class(classes: ClassMap) -> None:
    if len(classes.shared) < 2:
        warnings.warn(
            'LD leaves the classes out: their softmax is constant, because '
            f'the networks share only one ({classes.shared[0]}). Set '
            'kd_weight=0; mmkd.KD distils a single class.',
            stacklevel=2,
        )


def valuable_region(
    anchors: Tensor,
    valid: Tensor,
    level_sizes: Sequence[int],
    boxes: Tensor,
    *,
    overlap: str,
    gamma: float,
    topk: int,
) -> Tensor:
    """Return the weights of an image's anchors in the valuable region.

    Args:
        anchors: (N, 4) as xyxy, in pixels, level by level.
        valid: (N,) which of them are assigned.
        level_sizes: The number of anchors in each level.
        boxes: (M, 4) the objects' boxes as xyxy, in pixels.
        overlap: ``'iof'`` or ``'iou'``, what the DIoU starts from.
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
    diou = overlaps
    if overlap == 'iof':
        diou = bbox_overlaps(anchors, boxes, mode='iof')
    gap = _centres(anchors)[:, None] - _centres(boxes)
    distance = gap.square().sum(-1)
    hull = torch.max(anchors[:, None, 2:], boxes[:, 2:]) - torch.min(
        anchors[:, None, :2], boxes[:, :2]
    )
    diou = diou - distance / hull.square().sum(-1).clamp(min=1e-6)
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
