"""Deep mutual learning (DML)."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from torch import Tensor, nn

from mmkd.core.method import Method
from mmkd.data.batch import Batch
from mmkd.detectors.dense import student_dense, student_targets
from mmkd.detectors.dense_checks import check_dense, check_same_priors
from mmkd.detectors.facts import WITH_BOXES
from mmkd.detectors.record import StepRecord
from mmkd.detectors.two_stage import deltas_of_label
from mmkd.errors import ConfigError
from mmkd.losses.kl import BinaryProblems
from mmkd.peers.view import as_teacher, networks_of
from mmkd.registry import METHODS
from mmkd.teachers.view import TeacherView
from mmkd.utils import Official, build_checked, process_share

from .feature_base import FeatureMethod
from .kd import class_kl
from .mutual_logits import check_mutual, mutual_logits


@METHODS.register_module(name=['DML', 'MutualLearning'])
class DML(Method):
    r"""DML: K networks that train together learn from each other.

    .. math::
        L_i = L_{task, i} + \frac{1}{K - 1} \sum_{j \ne i}
            \frac{T^2}{N_i} \sum_n w_n \,
            \mathrm{KL}(\mathrm{sg}[p^j_n] \| p^i_n)

    for the student and each of ``distillation.peers``. KL, weights and
    normaliser are those of :class:`~mmkd.methods.kd.KD`; sg stops the
    gradient, so a network does not move as a target.

    * In one-stage detectors, n runs over all priors, which must correspond.
      :math:`w_n` is the weight of the prior's classification in network i's
      own loss, and :math:`N_i` is the number of its positives.
    * In two-stage detectors, n runs over the RoIs that i *and* j are trained
      on, and :math:`N_i` is their number. Each network scores the other's
      RoIs on its own features, with a gradient into the network that learns.
      Cascades are compared stage by stage.

    ``box_weight`` adds a term on the boxes of the :math:`P_i` positives of i
    (averaged over the processes; in two-stage detectors, the positives among
    its RoIs, stage by stage):

    .. math::
        \frac{1}{K - 1} \sum_{j \ne i} \frac{1}{P_i} \sum_{n \in P_i}
            (1 - \mathrm{GIoU}(b^i_n, \mathrm{sg}[b^j_n]))

    ``features`` adds any method on feature maps. Each network then learns
    from the maps of each other network, and every pair has its own adapters.

    All networks are updated in the same step from the same outputs. The paper
    updates one after the other and computes the targets anew.

    The losses are logged as ``<method>.loss_<network>``,
    ``loss_box_<network>`` and ``loss_features_<network>``; the first network
    is called ``student``.

    Source: Zhang, Xiang, Hospedales, Lu, "Deep Mutual Learning", CVPR 2018,
    https://arxiv.org/abs/1706.00384, for classification with T = 1. The
    form for detectors, the temperature and the other two terms are ours.

    Args:
        temperature: T, above 0.
        box_weight: Weight of the box term, at least 0.
        features: Config of a method on feature maps, with its own
            ``loss_weight``, such as ``dict(type='mmkd.PKD')``.
        loss_weight: Weight of the method. At 0 every network trains alone.

    Raises:
        ConfigError: If an option is out of range, or the networks' heads
            differ in kind, classes or priors.
    """

    learns_from: ClassVar[str] = 'peers'
    official = (
        Official(
            code='https://github.com/YingZhangDUT/Deep-Mutual-Learning',
            compared='tests/methods/test_mutual.py'
            '::test_two_stage_heads_on_the_rois_of_both',
            differs='It is for re-identification: the mean over samples of '
            'the softmax KL, as here over RoIs. It updates one network after '
            'the other.',
        ),
    )

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
        """The methods between maps, by ``<learner>_from_<target>``."""

    @property
    def student_paths(self) -> Sequence[str]:
        return self.paths

    @property
    def peer_paths(self) -> Sequence[str]:
        return self.paths

    def prepare(self, student: StepRecord, teacher: TeacherView) -> None:
        networks = networks_of(student)
        check_mutual(networks, 'DML')
        if self.box_weight:
            _check_boxes(networks)
        if self.feature_cfg is not None:
            for learner, target in itertools.permutations(networks, 2):
                method = _feature_method(self.feature_cfg)
                method.prepare(networks[learner], as_teacher(networks[target]))
                self.features[f'{learner}_from_{target}'] = method

    def forward(
        self,
        student: StepRecord,
        teacher: TeacherView,
        batch: Batch,
    ) -> dict[str, Tensor]:
        networks = networks_of(student)
        losses = mutual_losses(networks, batch.data_samples, self.temperature)
        for name, learner in networks.items():
            others = {n: o for n, o in networks.items() if n != name}
            if self.box_weight:
                boxes = _mean(
                    [
                        box_distance(learner, target, batch.data_samples)
                        for target in others.values()
                    ]
                )
                losses[f'box_{name}'] = self.box_weight * boxes
            if self.features:
                losses[f'features_{name}'] = _mean(
                    [
                        self._from_maps(name, learner, other, batch)
                        for other in others.items()
                    ]
                )
        return losses

    def _from_maps(
        self,
        name: str,
        learner: StepRecord,
        other: tuple[str, StepRecord],
        batch: Batch,
    ) -> Tensor:
        """Return the loss of one network's maps against another's."""
        target, record = other
        method = cast(Method, self.features[f'{name}_from_{target}'])
        losses = method(learner, as_teacher(record), batch)
        return sum_of(list(losses.values()))


def mutual_losses(
    networks: Mapping[str, StepRecord],
    data_samples: Sequence[DetDataSample],
    temperature: float,
) -> dict[str, Tensor]:
    """Return each network's average divergence from the others, by name."""
    losses = {}
    for name, learner in networks.items():
        others = [o for o in networks.values() if o is not learner]
        losses[name] = mutual_kl(learner, others, data_samples, temperature)
    return losses


def mutual_kl(
    learner: StepRecord,
    targets: Sequence[StepRecord],
    data_samples: Sequence[DetDataSample],
    temperature: float,
) -> Tensor:
    """Return a network's average divergence from others, which are fixed."""
    if not learner.facts.is_two_stage and student_dense(learner).sigmoid:
        return _of_priors(learner, targets, data_samples, temperature)
    divergences = []
    for target in targets:
        pairs = mutual_logits(learner, target, data_samples)
        divergences.append(sum_of([class_kl(p, temperature) for p in pairs]))
    return _mean(divergences)


def _of_priors(
    learner: StepRecord,
    targets: Sequence[StepRecord],
    data_samples: Sequence[DetDataSample],
    temperature: float,
) -> Tensor:
    """Return it for sigmoid heads; see :class:`BinaryProblems`."""
    ours, *theirs = (
        _binary_problems(outputs, temperature)
        for outputs in (learner, *targets)
    )
    assigned = student_targets(learner, data_samples)
    divergence = ours.kl_from(theirs)
    return (divergence * assigned.weights).sum() / assigned.number


def _binary_problems(
    outputs: StepRecord, temperature: float
) -> BinaryProblems:
    key = f'binary problems at temperature {temperature}'
    if key not in outputs.cache:
        logits = student_dense(outputs).logits
        outputs.cache[key] = BinaryProblems(logits, temperature)
    return outputs.cache[key]


def box_distance(
    learner: StepRecord,
    target: StepRecord,
    data_samples: Sequence[DetDataSample],
) -> Tensor:
    """Return 1 - GIoU on the learner's positives; the target is fixed."""
    if learner.facts.is_two_stage:
        stages = range(len(learner.rois))
        return sum_of([_roi_box_distance(learner, target, s) for s in stages])
    targets = student_targets(learner, data_samples)
    ours = student_dense(learner).boxes_at(targets.index)
    theirs = student_dense(target).boxes_at(targets.index).detach()
    overlap = bbox_overlaps(ours, theirs, mode='giou', is_aligned=True)
    return (1 - overlap).sum() / targets.number


def _roi_box_distance(
    learner: StepRecord, target: StepRecord, stage: int
) -> Tensor:
    """Return it on the RoIs of one of the learner's stages."""
    sample, facts = learner.rois[stage], learner.facts.rois[stage]
    scores = as_teacher(target).score_rois(sample, stage)
    assert sample.deltas is not None
    assert scores.deltas is not None
    rois = sample.boxes[:, 1:]
    ours, theirs = (
        coder.decode(rois, deltas_of_label(deltas, sample.labels).float())
        for coder, deltas in (
            (facts.coder, sample.deltas),
            (scores.coder, scores.deltas.detach()),
        )
    )
    overlap = bbox_overlaps(ours, theirs, mode='giou', is_aligned=True)
    positive = (sample.labels < facts.classes).float()
    number = process_share(positive.sum(), least=1)
    return facts.weight * ((1 - overlap) * positive).sum() / number


def sum_of(losses: Sequence[Tensor]) -> Tensor:
    first, *others = losses
    return sum(others, first)


def _mean(losses: Sequence[Tensor]) -> Tensor:
    return sum_of(losses) / len(losses)


def _feature_method(cfg: Mapping[str, Any]) -> FeatureMethod:
    where = 'DML.features'
    method = build_checked(METHODS, cfg, where)
    if not isinstance(method, FeatureMethod) or not method.images_only:
        raise ConfigError(
            f'{where} takes a method on feature maps of whole images, such '
            f"as dict(type='mmkd.PKD'), got {type(method).__name__}."
        )
    return method


def _check_boxes(networks: Mapping[str, StepRecord]) -> None:
    where = 'DML.box_weight'
    if networks['student'].facts.is_two_stage:
        _check_roi_boxes(networks, where)
        return
    first = check_dense(networks['student'], 'student', where).facts
    for name, record in networks.items():
        facts = check_dense(record, name, where).facts
        if not facts.has_boxes or facts.kind != first.kind:
            raise ConfigError(
                f'{where} compares the boxes of networks with the same head, '
                f'one of {", ".join(kind.__name__ for kind in WITH_BOXES)}; '
                f'"student" has {first.kind}, "{name}" {facts.kind}. Set it '
                'to 0.'
            )
        check_same_priors(first, facts, where, centres=True)
        if facts.norm_on_bbox != first.norm_on_bbox:
            raise ConfigError(
                f'{where} compares distances in one unit; norm_on_bbox is '
                f'{first.norm_on_bbox} in the head of "student", '
                f'{facts.norm_on_bbox} in that of "{name}". Give both the '
                'same.'
            )


def _check_roi_boxes(networks: Mapping[str, StepRecord], where: str) -> None:
    for name, record in networks.items():
        for facts in record.facts.rois:
            if not hasattr(facts.coder, 'means') or not facts.with_boxes:
                raise ConfigError(
                    f'{where} compares boxes that RoI heads predict as '
                    f'deltas; the {facts.kind} of "{name}" has none. Set it '
                    'to 0.'
                )
