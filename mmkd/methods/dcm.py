"""Dense cross-layer mutual distillation (DCM)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mmdet.structures import DetDataSample
from torch import Tensor, nn

from mmkd.core.method import Method
from mmkd.data.batch import Batch
from mmkd.detectors.auxiliary import AuxiliaryHead
from mmkd.detectors.dense_checks import check_dense
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError
from mmkd.peers.view import networks_of
from mmkd.registry import METHODS
from mmkd.teachers.view import TeacherView
from mmkd.utils import Official

from .mutual import mutual_kl, sum_of
from .mutual_logits import check_mutual

STAGES = ('backbone.layer2', 'backbone.layer3')


@METHODS.register_module()
class DCM(Method):
    r"""Two networks teach each other at every pair of depths.

    Each of the two networks, the student and its only peer, has auxiliary
    heads on earlier stages of its backbone in addition to the stock head
    h = 3:

    .. math::
        L = \sum_{h=1}^{6} L_{task, h}
            + \sum_{a=1}^{3} \sum_{b=1}^{3} \left(
              \mathrm{KL}(\mathrm{sg}[p^2_b] \| p^1_a)
              + \mathrm{KL}(\mathrm{sg}[p^1_a] \| p^2_b) \right)

    These are 3 same-stage and 6 cross-stage pairs in both directions, hence
    18 terms, none of them within one network. No gradient into the backbones
    is stopped. KL, weights and normaliser are those of
    :class:`~mmkd.methods.mutual.DML`, with the learning head's own
    assignment.

    Some of the paper carries over to detectors: heads at three depths, each
    with the full task; all pairs of logits; all weights 1; and auxiliary
    heads that are not in the stock checkpoints. Some does not: the paper's
    auxiliary classifiers end in one vector per image, after copies of the
    building blocks of the later stages, but a dense head needs maps of all
    strides. Here each auxiliary head is a freshly initialised copy of the
    network's own dense head, on a pyramid of convolutions from that single
    stage (:class:`.StagePyramid`). Its priors are therefore those of the
    stock head, and every pair of logits corresponds. It is shallower than
    the paper's. Two-stage detectors are left out, because their RoIs differ
    from head to head.

    The log has ``<method>.loss_aux<n>_<network>``, the task loss of auxiliary
    head n, and ``loss_kl_<network>``, the 9 terms by which a network learns.

    Source: Yao, Sun, "Knowledge Transfer via Dense Cross-Layer
    Mutual-Distillation", ECCV 2020, https://arxiv.org/abs/2008.07816, and its
    code sundw2014/DCM, for classification. What it becomes for detectors is
    ours.

    Args:
        stages: Module paths of the student's earlier stages, shallow first.
        peer_stages: As many module paths of the peer; None takes the same.
        kl_weight: Weight of the 18 terms, at least 0. At 0 the heads only
            supervise their own backbones.
        temperature: T, above 0; 1 in the paper.
        loss_weight: Weight of the method, auxiliary task losses included.

    Raises:
        ConfigError: If an option is out of range, there is not exactly one
            peer, or the heads are not dense or do not fit.
        TapError: If a stage does not exist.
    """

    learns_from: ClassVar[str] = 'peers'
    official = (
        Official(
            code='https://github.com/sundw2014/DCM',
            compared='tests/methods/test_dcm.py::test_eighteen_terms_by_loops',
            differs='It is for classification: the 18 terms and their weights '
            'are its own; the heads, their KL and its normaliser are not.',
        ),
    )

    def __init__(
        self,
        *,
        stages: Sequence[str] = STAGES,
        peer_stages: Sequence[str] | None = None,
        kl_weight: float = 1.0,
        temperature: float = 1.0,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        self.check_positive(temperature=temperature)
        self.check_not_negative(kl_weight=kl_weight)
        self.temperature, self.kl_weight = temperature, kl_weight
        self.stages = tuple(stages)
        self.peer_stages = tuple(peer_stages or stages)
        if not stages or len(self.stages) != len(self.peer_stages):
            raise ConfigError(
                'DCM needs as many stages of the peer as of the student, and '
                f'at least one, got stages={self.stages} and '
                f'peer_stages={self.peer_stages}'
            )
        self.auxiliary: Any = nn.ModuleDict()

    @property
    def student_paths(self) -> Sequence[str]:
        return ('neck', *self.stages)

    @property
    def peer_paths(self) -> Sequence[str]:
        return ('neck', *self.peer_stages)

    def prepare(self, student: StepRecord, teacher: TeacherView) -> None:
        networks = networks_of(student)
        if len(networks) != 2:
            raise ConfigError(
                'DCM ties two networks, the student and one peer; there are '
                f'{len(student.peers)} in distillation.peers.'
            )
        for name, outputs in networks.items():
            check_dense(outputs, name, 'DCM')
        check_mutual(networks, 'DCM')
        for name, outputs in networks.items():
            levels = outputs.features('neck')
            facts = outputs.facts.dense
            assert facts is not None
            self.auxiliary[name] = nn.ModuleList(
                AuxiliaryHead(stage, levels, facts)
                for stage in self._stage_maps(name, outputs)
            )

    def forward(
        self,
        student: StepRecord,
        teacher: TeacherView,
        batch: Batch,
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        heads: dict[str, list[StepRecord]] = {}
        for name, outputs in networks_of(student).items():
            heads[name] = []
            sizes = [level.shape[-2:] for level in outputs.features('neck')]
            stages = self._stage_maps(name, outputs)
            for n, (head, stage) in enumerate(
                zip(self.auxiliary[name], stages, strict=True), 1
            ):
                task_loss, produced = head.loss(
                    stage, sizes, batch.data_samples
                )
                losses[f'aux{n}_{name}'] = task_loss
                heads[name].append(produced)
            heads[name].append(outputs)
        if self.kl_weight:
            losses |= self._divergences(heads, batch.data_samples)
        return losses

    def _divergences(
        self,
        heads: Mapping[str, Sequence[StepRecord]],
        data_samples: Sequence[DetDataSample],
    ) -> dict[str, Tensor]:
        """Sum over all pairs of heads, for each network that learns."""
        (one, ours), (other, theirs) = heads.items()
        return {
            f'kl_{name}': self.kl_weight
            * len(targets)  # mutual_kl averages, but the terms are summed
            * sum_of(
                [
                    mutual_kl(each, targets, data_samples, self.temperature)
                    for each in learners
                ]
            )
            for name, learners, targets in (
                (one, ours, theirs),
                (other, theirs, ours),
            )
        }

    def _stage_maps(self, name: str, outputs: StepRecord) -> list[Tensor]:
        paths = self.stages if name == 'student' else self.peer_stages
        return [outputs.features(path)[-1] for path in paths]
