"""Cross-head knowledge distillation (Wang et al., CVPR 2024)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
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
from mmkd.utils import Official, process_share

from .class_logits import sum_over_priors
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
    loss (0 for ignored priors), :math:`u_i = \max_c p^t_{ic}` where
    :math:`v_i > 0`, :math:`\kappa` is ``beta``, and N the number of the
    student's positives, at least 1 in each image. N and :math:`\sum u` are
    averaged over the processes. :math:`L_{quality}` is the binary
    cross-entropy of centerness (or IoU) with the teacher's, summed over the
    positives and divided by N.

    On unlabelled images, N and :math:`v_i` come from the student's own
    assignment of the teacher's confident detections.

    Before they go on, each channel of the features gets the mean and standard
    deviation of the teacher's. By default these are the features after layer
    i's activation, over the whole batch with its padding, and the aligned
    features are rectified once more, as in the official code. The paper
    describes no alignment, as with ``align=None``. Where the widths differ, a
    1x1 convolution comes first (the official code fails on such pairs).

    Source: Wang, Chen, Cai, Wang, Lin, Cheng, "CrossKD: Cross-Head Knowledge
    Distillation for Dense Object Detection", CVPR 2024,
    https://arxiv.org/abs/2306.11369. The weights :math:`u_i` are those of
    its code (jbwang1997/CrossKD); the paper says 1 in the foreground and 0
    elsewhere. That code means to take the features before the activation, but
    the activation of a ``ConvModule`` works in place and has changed them by
    then. It uses layer 3, :math:`w_{cls} = 1`, and :math:`w_{box} = 4` for
    bins (GFL), 1 for boxes (RetinaNet, ATSS), with a quality weight of 1 only
    in ATSS. In FCOS it uses layer 2, :math:`w_{cls} = 0.4`, and 0.75 times
    the negative logarithm of the IoU, both divided by the sum of centerness;
    that form is not built here. It does not average :math:`\sum u`, and in
    RetinaNet N, over the processes.

    Args:
        layer: i, from 0 (the neck's maps) to the number of layers in a
            tower.
        beta: Exponent of the focusing factor, at least 0.
        cls_weight: Weight of the classes, at least 0.
        box_weight: Weight of the boxes, at least 0; by default 4 for heads
            with bins and 1 for others.
        quality_weight: Weight of the centerness or IoU, at least 0.
        align: What a channel's mean and deviation are taken over:
            ``'batch'`` with its padding, or ``'image'``, each without its
            padding, so that they do not depend on the other images. None
            leaves the features as they are.
        post_activation: Whether the features are those after layer i's
            activation. False takes them before it, after the norm.
        ignore_padding: Whether priors whose centre lies outside their image
            have :math:`v_i = 0`, even if the stock loss trains on them
            (FCOS does on all, the others up to the next multiple of
            ``pad_size_divisor``).
        loss_weight: Weight of the method.

    Raises:
        ConfigError: If an option is outside its range, or the pair's heads
            have no such towers, no sigmoid, or other strides or numbers of
            priors.
    """

    official = (
        Official(
            code='https://github.com/jbwang1997/CrossKD',
            compared='tests/methods/test_crosskd.py::TestOfficialCode',
            options=dict(
                layer=3,
                beta=1.0,
                cls_weight=1.0,
                box_weight=4.0,
                quality_weight=0.0,
                align='batch',
                post_activation=True,
                ignore_padding=False,
            ),
            config='crosskd_gfl_r50.py',
            ap='GFL R101→R50, 1x: 40.2→43.7',
            differs=(
                'The sum of the box weights is averaged over the processes.'
            ),
        ),
        Official(
            code='https://github.com/jbwang1997/CrossKD',
            compared='tests/methods/test_crosskd.py::TestOfficialCode',
            options=dict(layer=3, box_weight=1.0, quality_weight=1.0),
            differs=(
                'For ATSS; RetinaNet is the same with `quality_weight=0.0`, '
                'where N is averaged over the processes. The losses of FCOS '
                '(IoU, divided by the sum of centerness) are not built.'
            ),
        ),
    )

    needs = (DENSE, FEATURES, NETWORK)
    needs_labels = False
    reads_objects = True

    def __init__(
        self,
        *,
        layer: int = 3,
        beta: float = 1.0,
        cls_weight: float = 1.0,
        box_weight: float | None = None,
        quality_weight: float = 0.0,
        align: str | None = 'batch',
        post_activation: bool = True,
        ignore_padding: bool = False,
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
        self.check_choice(
            (True, False),
            post_activation=post_activation,
            ignore_padding=ignore_padding,
        )
        self.post_activation = post_activation
        self.ignore_padding = ignore_padding
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
        # Before its activation, a layer is tapped after its norm, if any.
        parts = [''] if self.post_activation else ['.norm', '.conv']
        return [
            f'bbox_head.{tower}.{self.layer - 1}{part}'
            for tower, weight in self.weights.items()
            if weight != 0 or self.quality_weight
            for part in parts
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
        self._tapped = [self._path(own.facts, tower) for tower in towers]
        for tower, path in zip(towers, self._tapped, strict=True):
            mine = student.features(path)[0]
            path = self._path(other.facts, tower)
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
        shared = None  # the columns of both that count
        if not teacher.class_map.identical:
            shared = teacher.class_map.teacher_index
        # (B, N) weights v of the priors
        weights = targets.weights
        if not self.ignore_padding:
            weights = targets.stock_weights
        confidence = theirs.largest(shared).float().sigmoid() * (weights > 0)
        number = _number_of_positives(targets)
        losses = {}
        if self.cls_weight:

            def focal(own: Tensor, other: Tensor) -> Tensor:
                if shared is not None:
                    own, other = own[:, shared], other[:, shared]
                scores = other.float().sigmoid()
                return soft_focal_loss(own, scores, beta=self.beta).sum(-1)

            total = sum_over_priors(focal, crossed, theirs, weights) / number
            losses['cls'] = self.cls_weight * total
        if self.box_weight != 0:
            losses['box'] = self._box_loss(crossed, theirs, confidence, number)
        if self.quality_weight:
            entropy = _quality_entropy(crossed, theirs)
            total = (entropy * targets.positive).sum() / number
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
            tower: (self._path(own, tower), self._path(other, tower))
            for tower in self.adapters
        }

    def _path(self, facts: DenseFacts, tower: str) -> str:
        return tower_path(
            facts, tower, self.layer, activated=self.post_activation
        )

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
            # Any other activation would change features that are equal.
            if not self.post_activation or isinstance(activate, nn.ReLU):
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
            total = process_share(confidence.sum(), least=EPSILON)
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
    weights = None
    if over == 'image':
        weights = image_weights(data_samples, feature)
    axes = (0, 2, 3) if over == 'batch' else (2, 3)
    mean, deviation = _moments(feature, weights, axes)
    mean_t, deviation_t = _moments(target, weights, axes)
    # Without epsilon a channel that is constant would become NaN.
    scale = deviation_t / (deviation + EPSILON)
    return torch.addcmul(mean_t, feature - mean, scale)


def _moments(
    maps: Tensor, weights: Tensor | None, axes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return the mean and the unbiased deviation along the axes."""
    if weights is None:
        single = all(maps.shape[axis] == 1 for axis in axes)
        deviation, mean = torch.std_mean(
            maps, axes, correction=1 - single, keepdim=True
        )
        return mean, deviation
    mean = (weights * maps).sum(axes, keepdim=True)
    variance = (weights * (maps - mean).square()).sum(axes, keepdim=True)
    # The root has no gradient at 0.
    return mean, variance.clamp(min=EPSILON**2).sqrt()


def _number_of_positives(targets: DenseTargets) -> Tensor:
    """Return N: each image counts as one positive at least."""
    each = targets.positive.sum(1).clamp(min=1)
    return process_share(each.sum())


def _quality_entropy(crossed: DenseOutputs, theirs: DenseOutputs) -> Tensor:
    assert crossed.quality is not None
    assert theirs.quality is not None
    return F.binary_cross_entropy_with_logits(
        crossed.quality.float(),
        theirs.quality.float().sigmoid(),
        reduction='none',
    )
