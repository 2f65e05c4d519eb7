"""Deep mutual learning (DML)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

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
from torch import Tensor

from mmkd.dense import (
    DenseOutputs,
    check_dense,
    check_same_priors,
    student_dense,
    student_targets,
)
from mmkd.outputs import Outputs
from mmkd.peer_view import check_mutual, mutual_logits, networks_of
from mmkd.registry import METHODS
from mmkd.utils import ConfigError

from .base import Method
from .kd import class_kl

if TYPE_CHECKING:
    from mmkd.teacher import TeacherOutputs

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

    ``box_weight`` adds, for one-stage detectors, the boxes of the positives
    of i, of which there are :math:`P_i` (averaged over the processes):

    .. math::
        \frac{1}{K - 1} \sum_{j \ne i} \frac{1}{P_i} \sum_{n \in P_i}
            (1 - \mathrm{GIoU}(b^i_n, \mathrm{sg}[b^j_n]))

    All networks are updated in the same step from the same outputs; the
    paper updates one after the other and computes the targets anew.

    Logged as ``<method>.loss_<network>`` and ``loss_box_<network>``;
    ``student`` is the name of the first.

    Source: Zhang, Xiang, Hospedales, Lu, "Deep Mutual Learning", CVPR 2018,
    https://arxiv.org/abs/1706.00384, for classification with T = 1. What it
    becomes for detectors, the temperature and the box term are ours.

    Args:
        temperature: T, above 0.
        box_weight: Weight of the box term, at least 0.
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
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        self.check_positive(temperature=temperature)
        self.check_not_negative(box_weight=box_weight)
        self.temperature, self.box_weight = temperature, box_weight

    @property
    def student_paths(self) -> Sequence[str]:
        return ('neck',)  # what RoI heads score the others' RoIs on

    @property
    def peer_paths(self) -> Sequence[str]:
        return ('neck',)

    def prepare(self, student: Outputs, teacher: Outputs) -> None:
        networks = networks_of(student)
        check_mutual(networks, 'MutualLearning')
        if self.box_weight:
            _check_boxes(networks)

    def forward(
        self,
        student: Outputs,
        teacher: 'TeacherOutputs',
        data_samples: Sequence[DetDataSample],
    ) -> dict[str, Tensor]:
        networks = networks_of(student)
        losses = mutual_losses(networks, data_samples, self.temperature)
        if self.box_weight:
            for name, learner in networks.items():
                each = [
                    box_distance(learner, target, data_samples)
                    for target in networks.values()
                    if target is not learner
                ]
                losses[f'box_{name}'] = self.box_weight * _mean(each)
        return losses


def mutual_losses(
    networks: Mapping[str, Outputs],
    data_samples: Sequence[DetDataSample],
    temperature: float,
) -> dict[str, Tensor]:
    """Each network's average divergence from the K - 1 others', by name."""
    return {
        name: _mean(
            [
                mutual_kl(learner, target, data_samples, temperature)
                for target in networks.values()
                if target is not learner
            ]
        )
        for name, learner in networks.items()
    }


def mutual_kl(
    learner: Outputs,
    target: Outputs,
    data_samples: Sequence[DetDataSample],
    temperature: float,
) -> Tensor:
    """Divergence of a network from another one, which gets no gradient."""
    pairs = mutual_logits(learner, target, data_samples)
    return sum_of([class_kl(pair, temperature) for pair in pairs])


def box_distance(
    learner: Outputs,
    target: Outputs,
    data_samples: Sequence[DetDataSample],
) -> Tensor:
    """1 - GIoU on the learner's positives; the target gets no gradient."""
    targets = student_targets(learner, data_samples)
    ours = boxes_at(student_dense(learner), targets.index)
    theirs = boxes_at(student_dense(target), targets.index).detach()
    overlap = bbox_overlaps(ours, theirs, mode='giou', is_aligned=True)
    return (1 - overlap).sum() / targets.number


def boxes_at(dense: DenseOutputs, index: tuple[Tensor, Tensor]) -> Tensor:
    """The boxes of chosen priors, (P, 4) as xyxy.

    Deltas are decoded to pixels. Distances stay in the head's unit, around
    the prior: the GIoU of two of them does not depend on either.
    """
    assert dense.regression is not None
    if dense.bins is not None:
        bins = dense.bins[index].float().softmax(-1)  # (P, 4, n + 1)
        values = torch.arange(bins.shape[-1]).to(bins)
        distances = bins @ values
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


def _check_boxes(networks: Mapping[str, Outputs]) -> None:
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
