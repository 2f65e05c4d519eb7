"""Deep mutual learning (DML)."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from mmdet.models.dense_heads import (
    ATSSHead,
    FCOSHead,
    GFLHead,
    PAAHead,
    RetinaHead,
)
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from mmdet.utils import reduce_mean
from torch import Tensor, nn

from mmkd.core.method import Method
from mmkd.detectors.dense import DenseOutputs, student_dense, student_targets
from mmkd.detectors.dense_checks import check_dense, check_same_priors
from mmkd.detectors.record import Outputs, box_heads
from mmkd.detectors.two_stage import deltas_of_label
from mmkd.errors import ConfigError
from mmkd.losses.kl import BinaryProblems
from mmkd.peers.view import as_teacher, networks_of
from mmkd.registry import METHODS
from mmkd.utils import build_checked

from .feature_base import FeatureMethod
from .kd import class_kl
from .mutual_logits import check_mutual, mutual_logits

if TYPE_CHECKING:
    from mmkd.teachers.frozen_view import TeacherOutputs

WITH_BOXES = (ATSSHead, FCOSHead, GFLHead, PAAHead, RetinaHead)
"""Heads whose boxes can be read from their own output; subclasses refine
theirs in ways of their own."""


@METHODS.register_module()
class MutualLearning(Method):
    r"""DML: K networks that train together learn from each other.

    .. math::
        L_i = L_{task, i} + \frac{1}{K - 1} \sum_{j \ne i}
            \frac{T^2}{N_i} \sum_n w_n \,
            \mathrm{KL}(\mathrm{sg}[p^j_n] \| p^i_n)

    for the student and each of ``distillation.peers``. KL, weights and
    normaliser are those of :class:`~mmkd.methods.kd.KD`; sg stops the
    gradient: a network is never pulled as a target.

    * One-stage detectors: n runs over all priors, which must correspond;
      :math:`w_n` is the weight of the prior's classification in network i's
      own loss, :math:`N_i` the number of its positives.
    * Two-stage detectors: n runs over the RoIs that i *and* j are trained
      on, :math:`N_i` is their number. Either network scores the other's RoIs
      on its own features, with a gradient into the network that learns.
      Stage by stage in a cascade.

    ``box_weight`` adds the boxes of the positives of i, of which there are
    :math:`P_i` (averaged over the processes; in two-stage detectors those of
    its RoIs, stage by stage):

    .. math::
        \frac{1}{K - 1} \sum_{j \ne i} \frac{1}{P_i} \sum_{n \in P_i}
            (1 - \mathrm{GIoU}(b^i_n, \mathrm{sg}[b^j_n]))

    ``features`` adds any method on feature maps, by which each network
    learns from each other one's maps, through adapters of each pair's own.

    All networks are updated in the same step from the same outputs; the
    paper updates one after the other and computes the targets anew.

    Logged as ``<method>.loss_<network>``, ``loss_box_<network>`` and
    ``loss_features_<network>``; ``student`` is the name of the first.

    Source: Zhang, Xiang, Hospedales, Lu, "Deep Mutual Learning", CVPR 2018,
    https://arxiv.org/abs/1706.00384, for classification with T = 1. What it
    becomes for detectors, the temperature and the other two terms are ours.

    Args:
        temperature: T, above 0.
        box_weight: Weight of the box term, at least 0.
        features: Config of a method on feature maps, with its own
            ``loss_weight``, such as ``dict(type='mmkd.PKD')``.
        loss_weight: Weight of the method; 0: every network trains alone.

    Raises:
        ConfigError: If an option is out of range, or the networks' heads
            differ in kind, classes or priors.
    """

    needs: ClassVar[str] = 'peers'

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        box_weight: float = 0.0,
        features: Mapping[str, Any] | None = None,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        self.check_positive(temperature=temperature)
        self.check_not_negative(box_weight=box_weight)
        self.temperature, self.box_weight = temperature, box_weight
        self.feature_cfg = features
        # RoI heads score the others' RoIs on the neck.
        self.paths: tuple[str, ...] = ('neck',)
        if features is not None:
            method = _feature_method(features)
            both = (*method.student_paths, *method.teacher_paths)
            self.paths = tuple(dict.fromkeys(('neck', *both)))
        self.features = nn.ModuleDict()
        """``<learner>_from_<target>`` to the method between their maps."""

    @property
    def student_paths(self) -> Sequence[str]:
        return self.paths

    @property
    def peer_paths(self) -> Sequence[str]:
        return self.paths

    def prepare(self, student: Outputs, teacher: Outputs) -> None:
        networks = networks_of(student)
        check_mutual(networks, 'MutualLearning')
        if self.box_weight:
            _check_boxes(networks)
        if self.feature_cfg is not None:
            for learner, target in itertools.permutations(networks, 2):
                method = _feature_method(self.feature_cfg)
                method.prepare(networks[learner], networks[target])
                self.features[f'{learner}_from_{target}'] = method

    def forward(
        self,
        student: Outputs,
        teacher: 'TeacherOutputs',
        data_samples: Sequence[DetDataSample],
    ) -> dict[str, Tensor]:
        networks = networks_of(student)
        losses = mutual_losses(networks, data_samples, self.temperature)
        for name, learner in networks.items():
            others = {n: o for n, o in networks.items() if n != name}
            if self.box_weight:
                boxes = _mean(
                    [
                        box_distance(learner, target, data_samples)
                        for target in others.values()
                    ]
                )
                losses[f'box_{name}'] = self.box_weight * boxes
            if self.features:
                losses[f'features_{name}'] = _mean(
                    [
                        self._from_maps(name, learner, other, data_samples)
                        for other in others.items()
                    ]
                )
        return losses

    def _from_maps(
        self,
        name: str,
        learner: Outputs,
        other: tuple[str, Outputs],
        data_samples: Sequence[DetDataSample],
    ) -> Tensor:
        """What one network's maps have to learn from another one's."""
        target, outputs = other
        method = cast(Method, self.features[f'{name}_from_{target}'])
        losses = method(learner, as_teacher(outputs), data_samples)
        return method.loss_weight * sum_of(list(losses.values()))


def mutual_losses(
    networks: Mapping[str, Outputs],
    data_samples: Sequence[DetDataSample],
    temperature: float,
) -> dict[str, Tensor]:
    """Each network's average divergence from the K - 1 others', by name."""
    losses = {}
    for name, learner in networks.items():
        others = [o for o in networks.values() if o is not learner]
        losses[name] = mutual_kl(learner, others, data_samples, temperature)
    return losses


def mutual_kl(
    learner: Outputs,
    targets: Sequence[Outputs],
    data_samples: Sequence[DetDataSample],
    temperature: float,
) -> Tensor:
    """A network's average divergence from others, which get no gradient."""
    if not box_heads(learner.model) and student_dense(learner).sigmoid:
        return _of_priors(learner, targets, data_samples, temperature)
    divergences = []
    for target in targets:
        pairs = mutual_logits(learner, target, data_samples)
        divergences.append(sum_of([class_kl(p, temperature) for p in pairs]))
    return _mean(divergences)


def _of_priors(
    learner: Outputs,
    targets: Sequence[Outputs],
    data_samples: Sequence[DetDataSample],
    temperature: float,
) -> Tensor:
    """The same of sigmoid heads; see :class:`BinaryProblems`."""
    ours, *theirs = (
        _binary_problems(outputs, temperature)
        for outputs in (learner, *targets)
    )
    assigned = student_targets(learner, data_samples)
    divergence = ours.kl_from(theirs)
    return (divergence * assigned.weights).sum() / assigned.number


def _binary_problems(outputs: Outputs, temperature: float) -> BinaryProblems:
    key = f'binary problems at temperature {temperature}'
    if key not in outputs.cache:
        logits = student_dense(outputs).logits
        outputs.cache[key] = BinaryProblems(logits, temperature)
    return outputs.cache[key]


def box_distance(
    learner: Outputs,
    target: Outputs,
    data_samples: Sequence[DetDataSample],
) -> Tensor:
    """1 - GIoU on the learner's positives; the target gets no gradient."""
    if box_heads(learner.model):
        stages = range(len(learner.rois))
        return sum_of([_roi_box_distance(learner, target, s) for s in stages])
    targets = student_targets(learner, data_samples)
    ours = boxes_at(student_dense(learner), targets.index)
    theirs = boxes_at(student_dense(target), targets.index).detach()
    overlap = bbox_overlaps(ours, theirs, mode='giou', is_aligned=True)
    return (1 - overlap).sum() / targets.number


def _roi_box_distance(learner: Outputs, target: Outputs, stage: int) -> Tensor:
    """The same on the RoIs that one stage of the learner was trained on."""
    sample = learner.rois[stage]
    _, theirs = as_teacher(target).score_rois(sample, stage)
    assert sample.deltas is not None
    assert theirs is not None
    rois = sample.boxes[:, 1:]
    coders = [
        box_heads(outputs.model)[stage].bbox_coder
        for outputs in (learner, target)
    ]
    ours, theirs = (
        coder.decode(rois, deltas_of_label(deltas, sample.labels).float())
        for coder, deltas in zip(
            coders, (sample.deltas, theirs.detach()), strict=True
        )
    )
    overlap = bbox_overlaps(ours, theirs, mode='giou', is_aligned=True)
    positive = (sample.labels < sample.head.num_classes).float()
    number = reduce_mean(positive.sum()).clamp(min=1)
    heads = len(box_heads(learner.model))
    weights = learner.model.roi_head.stage_loss_weights if heads > 1 else [1]
    return weights[stage] * ((1 - overlap) * positive).sum() / number


def boxes_at(dense: DenseOutputs, index: tuple[Tensor, Tensor]) -> Tensor:
    """The boxes of chosen priors, (P, 4) as xyxy.

    Deltas are decoded to pixels. Distances stay in the head's unit, around
    the prior: the GIoU of two of them does not depend on either.
    """
    assert dense.regression is not None
    if dense.bins is not None:
        bins = dense.bins[index].float().softmax(-1)  # (P, 4, n + 1)
        values = torch.arange(bins.shape[-1]).to(bins)
        distances = (bins * values).sum(-1)  # a product `@` would be rounded
    elif isinstance(dense.head, FCOSHead):
        distances = dense.regression[index].float()
    else:
        deltas = dense.regression[index].float()
        return dense.head.bbox_coder.decode(dense.priors[index[1]], deltas)
    return torch.cat([-distances[:, :2], distances[:, 2:]], dim=1)


def sum_of(losses: Sequence[Tensor]) -> Tensor:
    first, *others = losses
    return sum(others, first)


def _mean(losses: Sequence[Tensor]) -> Tensor:
    return sum_of(losses) / len(losses)


def _feature_method(cfg: Mapping[str, Any]) -> FeatureMethod:
    where = 'MutualLearning.features'
    method = build_checked(METHODS, cfg, where)
    if not isinstance(method, FeatureMethod) or not method.images_only:
        raise ConfigError(
            f'{where} takes a method on feature maps of whole images, such '
            f"as dict(type='mmkd.PKD'), got {type(method).__name__}."
        )
    return method


def _check_boxes(networks: Mapping[str, Outputs]) -> None:
    if box_heads(networks['student'].model):
        _check_roi_boxes(networks)
        return
    heads: dict[str, Any] = {}
    for name, outputs in networks.items():
        head = check_dense(outputs, name, 'MutualLearning.box_weight').head
        heads[name] = head
        first = heads['student']
        known = type(head) in WITH_BOXES and type(head) is type(first)
        if not known:
            raise ConfigError(
                'MutualLearning.box_weight compares the boxes of networks '
                'with the same head, one of '
                f'{", ".join(kind.__name__ for kind in WITH_BOXES)}; '
                f'"student" has {type(first).__name__}, "{name}" '
                f'{type(head).__name__}. Set it to 0.'
            )
        check_same_priors(
            first, head, 'MutualLearning.box_weight', centres=True
        )
        units = [getattr(h, 'norm_on_bbox', False) for h in (first, head)]
        if units[0] != units[1]:
            raise ConfigError(
                'MutualLearning.box_weight compares distances in one unit; '
                f'norm_on_bbox is {units[0]} in the head of "student", '
                f'{units[1]} in that of "{name}". Give both the same.'
            )


def _check_roi_boxes(networks: Mapping[str, Outputs]) -> None:
    for name, outputs in networks.items():
        for head in box_heads(outputs.model):
            if not head.with_reg or not hasattr(head.bbox_coder, 'means'):
                raise ConfigError(
                    'MutualLearning.box_weight compares boxes that RoI heads '
                    f'predict as deltas; the {type(head).__name__} of '
                    f'"{name}" has none. Set it to 0.'
                )
