"""Cross-head knowledge distillation (Wang et al., CVPR 2024)."""

from collections.abc import Sequence

import torch.nn.functional as F
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from mmdet.utils import reduce_mean
from torch import Tensor, nn

from mmkd.core.method import Method
from mmkd.data.batch import Batch
from mmkd.detectors.adapters import build_adapter
from mmkd.detectors.dense import DenseOutputs, DenseTargets, student_targets
from mmkd.detectors.dense_checks import (
    check_dense,
    check_is_dense,
    check_same_priors,
)
from mmkd.detectors.facts import DenseFacts
from mmkd.detectors.record import StepRecord
from mmkd.detectors.towers import (
    activation,
    check_towers,
    cross,
    quality_tower,
    tower_path,
)
from mmkd.errors import ConfigError
from mmkd.losses import soft_focal_loss, softmax_kl
from mmkd.registry import METHODS
from mmkd.teachers.view import DENSE, FEATURES, NETWORK, TeacherView

from .feature_base import image_weights

ALIGNMENTS = ('image', 'batch', None)
EPSILON = 1e-6


@METHODS.register_module()
class CrossKD(Method):
    r"""The student's head features pass through the teacher's head.

    The features after layer i of the student's head continue through the
    layers i + 1 to n and the predictors of the frozen teacher's head. These
    cross-head predictions (z, and boxes b) approach the teacher's own
    predictions, while the student's own predictions follow only the ground
    truth:

    .. math::
        L_{cls} &= \frac{w_{cls}}{N} \sum_{i, c} v_i
            \, |\sigma(z_{ic}) - p^t_{ic}|^{\kappa}
            \, \mathrm{BCE}(\sigma(z_{ic}), p^t_{ic}) \\
        L_{box} &= \frac{w_{box}}{N} \sum_i u_i (1 - \mathrm{GIoU}(b_i, b^t_i))
        \quad\text{or, with bins,}\quad
        \frac{w_{box}}{4 \sum_i u_i} \sum_i u_i
            \sum_{sides} \mathrm{KL}(q^t_i \| q_i)

    over all priors; :math:`v_i` is the weight of the stock classification
    loss, 0 in the padding and for ignored priors, :math:`u_i = \max_c
    p^t_{ic}` where :math:`v_i > 0`, :math:`\kappa` is ``beta``, N the number
    of the student's positives. N and :math:`\sum u` are averaged over the
    processes. :math:`L_{quality}` is the binary cross-entropy of centerness
    (or IoU) with the teacher's, averaged over the positives.

    The features are taken after the convolution and its norm and before the
    activation. Each channel gets the teacher's mean and standard deviation,
    which are taken with ``align='image'`` over each image without its
    padding, and with ``'batch'`` over the batch with its padding, as in the
    official code. None leaves the features as they are, as the paper writes.
    Where the widths differ, a 1x1 convolution comes first (the official code
    refuses such pairs).

    Source: Wang, Chen, Cai, Wang, Lin, Cheng, "CrossKD: Cross-Head Knowledge
    Distillation for Dense Object Detection", CVPR 2024,
    https://arxiv.org/abs/2306.11369. The weights :math:`u_i` are those of
    its code (jbwang1997/CrossKD); the paper says 1 in the foreground and 0
    elsewhere. Its code uses layer 3, :math:`w_{cls} = 1`, and
    :math:`w_{box} = 4` for bins (GFL), 1 for boxes (RetinaNet, ATSS), with a
    quality weight of 1 only in ATSS. In FCOS it uses layer 2,
    :math:`w_{cls} = 0.4`, and 0.75 times the negative logarithm of the IoU,
    both divided by the sum of centerness.

    Args:
        layer: i, from 0 (the neck's maps) to the number of layers in a
            tower.
        beta: Exponent of the focusing factor, at least 0.
        cls_weight: Weight of the classes, at least 0.
        box_weight: Weight of the boxes, at least 0; by default 4 for heads
            with bins and 1 for others.
        quality_weight: Weight of the centerness or IoU, at least 0.
        align: ``'image'``, ``'batch'`` or None.
        loss_weight: Weight of the method.

    Raises:
        ConfigError: If an option is outside its range, or the pair's heads
            have no such towers, no sigmoid, or other strides or numbers of
            priors.
    """

    needs = (DENSE, FEATURES, NETWORK)

    def __init__(
        self,
        *,
        layer: int = 3,
        beta: float = 1.0,
        cls_weight: float = 1.0,
        box_weight: float | None = None,
        quality_weight: float = 0.0,
        align: str | None = 'image',
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        self.check_whole(0, layer=layer)
        self.check_not_negative(
            beta=beta,
            cls_weight=cls_weight,
            box_weight=1.0 if box_weight is None else box_weight,
            quality_weight=quality_weight,
        )
        self.check_choice(ALIGNMENTS, align=align)
        self.layer, self.beta, self.align = layer, beta, align
        self.cls_weight, self.box_weight = cls_weight, box_weight
        self.quality_weight = quality_weight
        self.weights = {'cls_convs': cls_weight, 'reg_convs': box_weight}
        self.adapters = nn.ModuleDict()
        self._tapped: Sequence[str] = ()

    @property
    def student_paths(self) -> Sequence[str]:
        return self._tapped or self.teacher_paths

    @property
    def teacher_paths(self) -> Sequence[str]:
        if self.layer == 0:
            return ('neck',)
        # A layer is tapped after its norm, or else after its convolution.
        return [
            f'bbox_head.{tower}.{self.layer - 1}.{part}'
            for tower, weight in self.weights.items()
            if weight != 0 or self.quality_weight
            for part in ('norm', 'conv')
        ]

    def prepare(self, student: StepRecord, teacher: TeacherView) -> None:
        own = check_dense(student, 'student', 'CrossKD')
        check_is_dense(teacher.facts, 'teacher', 'CrossKD')
        other = teacher.dense
        # Centres may differ: the box loss uses the teacher's priors twice.
        check_same_priors(own.facts, other.facts, 'CrossKD')
        for role, dense in (('student', own), ('teacher', other)):
            check_towers(dense, role, self.layer, 'CrossKD')
        if self.quality_weight and other.quality is None:
            raise ConfigError(
                'CrossKD.quality_weight is for heads with a centerness or '
                f"IoU branch; the teacher's {other.facts.kind} has none. "
                'Set it to 0.'
            )
        towers = self._read_towers(other.facts)
        self._tapped = [
            tower_path(own.facts, tower, self.layer) for tower in towers
        ]
        for tower, path in zip(towers, self._tapped, strict=True):
            mine = student.features(path)[0]
            path = tower_path(other.facts, tower, self.layer)
            theirs = teacher.features(path, student)[0]
            self.adapters[tower] = build_adapter(
                mine,
                theirs,
                adapt=mine.shape[1] != theirs.shape[1],
                where=f'CrossKD on {tower}',
            )

    def forward(
        self, student: StepRecord, teacher: TeacherView, batch: Batch
    ) -> dict[str, Tensor]:
        theirs = teacher.dense
        features = {
            tower: self._aligned(tower, student, teacher, batch)
            for tower in self.adapters
        }
        crossed = cross(theirs.facts, self.layer, features, teacher.maps)
        targets = student_targets(student, batch.data_samples)
        # (B, N, S) logits of the shared classes
        logits, logits_t = crossed.logits.float(), theirs.logits.float()
        if not teacher.class_map.identical:
            shared = teacher.class_map.teacher_index
            logits, logits_t = logits[..., shared], logits_t[..., shared]
        scores = logits_t.sigmoid()
        confidence = scores.amax(-1) * (targets.weights > 0)
        losses = {}
        if self.cls_weight:
            focal = soft_focal_loss(logits, scores, beta=self.beta).sum(-1)
            total = (targets.weights * focal).sum() / targets.number
            losses['cls'] = self.cls_weight * total
        if self.box_weight != 0:
            losses['box'] = self._box_loss(
                crossed, theirs, confidence, targets.number
            )
        if self.quality_weight:
            total = _quality_loss(crossed, theirs, targets)
            losses['quality'] = self.quality_weight * total
        return losses

    def tapped_pairs(
        self, student: StepRecord, teacher: TeacherView
    ) -> dict[str, tuple[str, str]]:
        """Return each tower's tap in the student and in the teacher."""
        own, other = student.facts.dense, teacher.facts.dense
        assert own is not None
        assert other is not None
        return {
            tower: (
                tower_path(own, tower, self.layer),
                tower_path(other, tower, self.layer),
            )
            for tower in self.adapters
        }

    def _read_towers(self, facts: DenseFacts) -> list[str]:
        """Return the towers that the losses of this head read."""
        return [
            tower
            for tower, weight in self.weights.items()
            if weight != 0
            or (self.quality_weight and tower == quality_tower(facts))
        ]

    def _aligned(
        self,
        tower: str,
        student: StepRecord,
        teacher: TeacherView,
        batch: Batch,
    ) -> list[Tensor]:
        """Return the input of the teacher's layer i + 1 for each level."""
        path, other = self.tapped_pairs(student, teacher)[tower]
        pairs = zip(
            student.features(path),
            teacher.features(other, student),
            strict=True,
        )
        adapt = self.adapters[tower]
        result = [
            align_moments(adapt(s), t, self.align, batch.data_samples)
            for s, t in pairs
        ]
        if self.layer > 0:
            activate = activation(teacher.dense.facts, tower, self.layer)
            result = [activate(feature) for feature in result]
        return result

    def _box_loss(
        self,
        crossed: DenseOutputs,
        theirs: DenseOutputs,
        confidence: Tensor,
        number: Tensor,
    ) -> Tensor:
        weight = self.box_weight
        if crossed.bins is not None and theirs.bins is not None:
            divergence = softmax_kl(crossed.bins, theirs.bins).sum(-1)
            total = reduce_mean(confidence.sum()).clamp(min=EPSILON)
            weight = 4.0 if weight is None else weight
            return weight * (confidence * divergence).sum() / (4 * total)
        overlap = bbox_overlaps(
            crossed.decoded(), theirs.decoded(), mode='giou', is_aligned=True
        )
        weight = 1.0 if weight is None else weight
        return weight * (confidence.flatten() * (1 - overlap)).sum() / number


def align_moments(
    feature: Tensor,
    target: Tensor,
    over: str | None,
    data_samples: Sequence[DetDataSample],
) -> Tensor:
    """Give a feature the mean and deviation of another's channels.

    Args:
        feature: (B, C, H, W).
        target: (B, C, H, W), without gradient.
        over: ``'image'`` for each image without its padding, ``'batch'`` for
            all images with their padding, None to leave the feature as it
            is.
        data_samples: The images, with their sizes.
    """
    if over is None:
        return feature.clone()  # the next activation works in place
    feature, target = feature.float(), target.float()
    images, _, height, width = feature.shape
    if over == 'batch':
        weights = feature.new_tensor(1 / (images * height * width))
        axes: tuple[int, ...] = (0, 2, 3)
    else:
        within = image_weights(data_samples, feature)
        flat = feature.new_tensor(1 / (height * width))
        weights, axes = flat if within is None else within, (2, 3)
    mean, deviation = _moments(feature, weights, axes)
    mean_t, deviation_t = _moments(target, weights, axes)
    return (feature - mean) / deviation * deviation_t + mean_t


def _moments(
    maps: Tensor, weights: Tensor, axes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    mean = (weights * maps).sum(axes, keepdim=True)
    variance = (weights * (maps - mean).square()).sum(axes, keepdim=True)
    # Without epsilon the root has no gradient on a map of one position.
    return mean, (variance + EPSILON**2).sqrt()


def _quality_loss(
    crossed: DenseOutputs, theirs: DenseOutputs, targets: DenseTargets
) -> Tensor:
    assert crossed.quality is not None
    assert theirs.quality is not None
    entropy = F.binary_cross_entropy_with_logits(
        crossed.quality.float(),
        theirs.quality.float().sigmoid(),
        reduction='none',
    )
    return (entropy * targets.positive).sum() / targets.number
