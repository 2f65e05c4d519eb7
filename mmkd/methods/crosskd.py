"""Cross-head knowledge distillation (Wang et al., CVPR 2024)."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from mmdet.utils import reduce_mean
from torch import Tensor, nn

from mmkd.core.method import Method
from mmkd.detectors.adapters import build_adapter
from mmkd.detectors.dense import (
    DenseOutputs,
    DenseTargets,
    read_dense,
    student_targets,
    teacher_dense,
)
from mmkd.detectors.dense_checks import check_dense, check_same_priors
from mmkd.detectors.record import Outputs
from mmkd.errors import ConfigError
from mmkd.losses.kl import softmax_kl
from mmkd.registry import METHODS

from .feature_base import image_weights

if TYPE_CHECKING:
    from mmkd.teachers.frozen_view import TeacherOutputs

BRANCHES = ('cls_convs', 'reg_convs')
"""The towers of a dense head, of classes and of boxes."""
ALIGNMENTS = ('image', 'batch', None)
EPSILON = 1e-6


@METHODS.register_module()
class CrossKD(Method):
    r"""The student's head features, through the teacher's head.

    The features that the student's head has behind its layer i go on through
    the layers i + 1 to n and the predictors of the frozen teacher's head.
    These cross-head predictions (z, and boxes b) approach the teacher's own,
    so that the student's own predictions answer to the ground truth alone:

    .. math::
        L_{cls} &= \frac{w_{cls}}{N} \sum_{i, c} v_i
            \, |\sigma(z_{ic}) - p^t_{ic}|^{\kappa}
            \, \mathrm{BCE}(\sigma(z_{ic}), p^t_{ic}) \\
        L_{box} &= \frac{w_{box}}{N} \sum_i u_i (1 - \mathrm{GIoU}(b_i, b^t_i))
        \quad\text{or, of bins,}\quad
        \frac{w_{box}}{4 \sum_i u_i} \sum_i u_i
            \sum_{sides} \mathrm{KL}(q^t_i \| q_i)

    over all priors; :math:`v_i` is the weight of the stock classification
    loss, 0 in the padding and for ignored priors, :math:`u_i = \max_c
    p^t_{ic}` where :math:`v_i > 0`, :math:`\kappa` is ``beta``, N the number
    of the student's positives. N and :math:`\sum u` are averaged over the
    processes. :math:`L_{quality}` is the binary cross-entropy of centerness
    (or IoU) with the teacher's, averaged over the positives.

    The features are taken behind the convolution and its norm, before the
    activation, and get the teacher's mean and standard deviation of each
    channel: ``align='image'`` over each image without its padding;
    ``'batch'`` over the batch with its padding, as in the official code;
    None leaves them as they are, as the paper writes. Where the widths
    differ, a 1x1 convolution comes first (the official code refuses them).

    Source: Wang, Chen, Cai, Wang, Lin, Cheng, "CrossKD: Cross-Head Knowledge
    Distillation for Dense Object Detection", CVPR 2024,
    https://arxiv.org/abs/2306.11369. The weights :math:`u_i` are of its code
    (jbwang1997/CrossKD); the paper says 1 in the foreground, 0 elsewhere.
    Its code uses layer 3, :math:`w_{cls} = 1`, and :math:`w_{box} = 4` for
    bins (GFL), 1 for boxes (RetinaNet, ATSS), with a quality weight of 1 in
    ATSS alone; in FCOS layer 2, :math:`w_{cls} = 0.4`, 0.75 times the
    negative logarithm of the IoU, both divided by the sum of centerness.

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
        # A layer is tapped behind its norm, or else behind its convolution.
        return [
            f'bbox_head.{branch}.{self.layer - 1}.{part}'
            for branch, weight in self.weights.items()
            if weight != 0 or self.quality_weight
            for part in ('norm', 'conv')
        ]

    def prepare(self, student: Outputs, teacher: Outputs) -> None:
        ours = check_dense(student, 'student', 'CrossKD')
        theirs = check_dense(teacher, 'teacher', 'CrossKD')
        # Not the centres: the box loss has the teacher's priors on both sides.
        check_same_priors(ours.head, theirs.head, 'CrossKD')
        for role, dense in (('student', ours), ('teacher', theirs)):
            _check_head(dense, role, self.layer)
        if self.quality_weight and theirs.quality is None:
            raise ConfigError(
                'CrossKD.quality_weight is for heads with a centerness or '
                f"IoU, the teacher's {type(theirs.head).__name__} has none. "
                'Set it to 0.'
            )
        branches = self._read_towers(theirs.head)
        self._tapped = [self._path(ours.head, branch) for branch in branches]
        for branch in branches:
            mine = student.features(self._path(ours.head, branch))[0]
            other = teacher.features(self._path(theirs.head, branch))[0]
            self.adapters[branch] = build_adapter(
                mine,
                other,
                adapt=mine.shape[1] != other.shape[1],
                where=f'CrossKD on {branch}',
            )

    def forward(
        self,
        student: Outputs,
        teacher: 'TeacherOutputs',
        data_samples: Sequence[DetDataSample],
    ) -> dict[str, Tensor]:
        theirs = teacher_dense(teacher)
        head = theirs.head
        features = {
            branch: self._aligned(branch, student, teacher, data_samples)
            for branch in self.adapters
        }
        crossed_head = from_layer(head, self.layer, features)
        crossed = read_dense(head, crossed_head(teacher.maps))
        targets = student_targets(student, data_samples)
        # (B, N, S) logits of the shared classes
        logits, logits_t = crossed.logits.float(), theirs.logits.float()
        if not teacher.class_map.identical:
            shared = teacher.class_map.teacher_index
            logits, logits_t = logits[..., shared], logits_t[..., shared]
        scores = logits_t.sigmoid()
        confidence = scores.amax(-1) * (targets.weights > 0)
        losses = {}
        if self.cls_weight:
            focal = soft_focal(logits, scores, self.beta).sum(-1)
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

    def _read_towers(self, head: Any) -> list[str]:
        """The towers that losses of this head read."""
        of_quality = BRANCHES[getattr(head, 'centerness_on_reg', True)]
        return [
            branch
            for branch, weight in self.weights.items()
            if weight != 0 or (self.quality_weight and branch == of_quality)
        ]

    def _path(self, head: Any, branch: str) -> str:
        """Where the feature behind layer i is tapped."""
        if self.layer == 0:
            return 'neck'
        layer = getattr(head, branch)[self.layer - 1]
        part = 'norm' if layer.with_norm else 'conv'
        return f'bbox_head.{branch}.{self.layer - 1}.{part}'

    def _aligned(
        self,
        branch: str,
        student: Outputs,
        teacher: 'TeacherOutputs',
        data_samples: Sequence[DetDataSample],
    ) -> list[Tensor]:
        """What enters the teacher's layer i + 1: (B, C, H, W) a level."""
        head, head_t = student.model.bbox_head, teacher.model.bbox_head
        ours = student.features(self._path(head, branch))
        theirs = teacher.features(self._path(head_t, branch), student)
        adapt = self.adapters[branch]
        result = [
            align_moments(adapt(s), t, self.align, data_samples)
            for s, t in zip(ours, theirs, strict=True)
        ]
        if self.layer > 0:
            activate = getattr(head_t, branch)[self.layer - 1].activate
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
            _decoded(crossed), _decoded(theirs), mode='giou', is_aligned=True
        )
        weight = 1.0 if weight is None else weight
        return weight * (confidence.flatten() * (1 - overlap)).sum() / number


class Feed(nn.Module):
    """Gives the levels' features one by one, whatever comes in."""

    def __init__(self, features: Sequence[Tensor]) -> None:
        super().__init__()
        self.features = iter(features)

    def forward(self, _: Tensor) -> Tensor:
        return next(self.features)


class Idle(nn.Module):
    """A tower that no loss reads: NaN, of one image, which costs little."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, level: Tensor) -> Tensor:
        return level.new_full((1, self.width, *level.shape[2:]), math.nan)


def from_layer(
    head: Any, layer: int, features: Mapping[str, Sequence[Tensor]]
) -> Any:
    """A dense head whose towers start behind a layer, with given features.

    Args:
        head: The head; it shares its modules with the result, and is left as
            it is.
        layer: The number of layers that are left out.
        features: For each tower, what enters its first remaining layer, a
            tensor a level. They are consumed in one call. A tower that is
            left out is :class:`Idle`.
    """
    result = copy.copy(head)
    towers = {b: nn.ModuleList([Idle(head.feat_channels)]) for b in BRANCHES}
    for branch, levels in features.items():
        remaining = getattr(head, branch)[layer:]
        towers[branch] = nn.ModuleList([Feed(levels), *remaining])
    # Past nn.Module's registration, which would change the head's own dict.
    result.__dict__['_modules'] = {**head._modules, **towers}
    return result


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
        over: ``'image'``: each image without padding; ``'batch'``: all
            images with their padding; None leaves the feature as it is.
        data_samples: The images' sizes.
    """
    if over is None:
        return feature.clone()  # an activation in place comes next
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
    # A root without epsilon has no gradient on a map of one position.
    return mean, (variance + EPSILON**2).sqrt()


def soft_focal(logits: Tensor, scores: Tensor, beta: float) -> Tensor:
    """Quality focal loss towards probabilities, each element's."""
    entropy = F.binary_cross_entropy_with_logits(
        logits, scores, reduction='none'
    )
    return (logits.sigmoid() - scores).abs().pow(beta) * entropy


def _decoded(dense: DenseOutputs) -> Tensor:
    """All boxes, (B * N, 4) as xyxy in pixels."""
    assert dense.regression is not None
    priors = dense.priors.expand(len(dense.regression), -1, -1)
    return dense.head.bbox_coder.decode(
        priors.flatten(0, 1), dense.regression.float().flatten(0, 1)
    )


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


def _check_head(dense: DenseOutputs, role: str, layer: int) -> None:
    """Check that a head has towers that can be cut, and boxes."""
    head = dense.head
    reason = None
    for branch in BRANCHES:
        layers = getattr(head, branch, None)
        if not isinstance(layers, nn.ModuleList) or not all(
            isinstance(conv, ConvModule)
            and conv.with_activation
            and conv.order == ('conv', 'norm', 'act')
            for conv in layers
        ):
            reason = f'has no {branch} of ConvModules that the levels share'
        elif len(layers) < layer:
            reason = (
                f'has {len(layers)} layers in its {branch}: set layer to '
                f'{len(layers)} or less'
            )
    if not dense.sigmoid:
        reason = 'has a softmax'
    if dense.bins is None and (
        not hasattr(head, 'bbox_coder')
        or dense.regression is None
        or dense.regression.shape[-1] != 4
    ):
        reason = 'regresses neither bins nor four numbers a prior'
    if reason is not None:
        raise ConfigError(
            'CrossKD fits dense heads like RetinaNet, FCOS, ATSS and GFL, '
            f"with layer={layer}; the {role}'s {type(head).__name__} "
            f'{reason}.'
        )
