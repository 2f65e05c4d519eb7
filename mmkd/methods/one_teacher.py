"""One teacher, several students that also learn from each other."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from mmkd.core.method import Method
from mmkd.data.batch import Batch
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError
from mmkd.peers.peer import TRAINED_TEACHER
from mmkd.peers.view import as_teacher, networks_of
from mmkd.registry import METHODS
from mmkd.teachers.view import TeacherView

from .class_logits import check_class_logits, class_logits
from .kd import class_kl
from .mutual import mutual_losses, sum_of
from .mutual_logits import check_mutual


@METHODS.register_module()
class OneTeacherSeveralStudents(Method):
    r"""K students learn from one teacher and from each other.

    .. math::
        L_{S_k} = L_{task} + \alpha T^2 \, \mathrm{KL}(p_T \| p_{S_k})
            + \frac{\beta}{K - 1} \sum_{j \ne k} T^2 \,
              \mathrm{KL}(\mathrm{sg}[p_{S_j}] \| p_{S_k})

    The students are the model and ``distillation.peers``. The teacher is
    ``distillation.teacher``. It was trained before and is frozen (offline),
    or, with ``teacher=dict(config=..., trainable=True)``, it trains in the
    same step by its own task loss alone (online). The first KL is exactly
    :class:`~mmkd.methods.kd.KD` for each student, and the second is exactly
    :class:`~mmkd.methods.mutual.DML` among the students, with their weights
    and normalisers. So :math:`\alpha = 0` is DML, and :math:`\beta = 0` is KD
    of K students that do not learn from each other.

    The losses are logged as ``<method>.loss_kd_<network>`` and
    ``loss_mutual_<network>``, where ``student`` is the model. The hook
    ``mmkd.EnsembleValidationHook`` evaluates the students as an ensemble, as
    the paper does.

    Source: Niyaz, Bathula, "Augmenting Knowledge Distillation with
    Peer-to-Peer Mutual Learning for Model Compression", ISBI 2022,
    https://arxiv.org/abs/2110.11023. There the teacher trains together with
    its students. UNVERIFIED: no code is public, and neither the weights nor
    T are given; the loss above is our reading of the text.

    Args:
        alpha: Weight of the teacher, at least 0.
        beta: Weight of the other students, at least 0.
        temperature: T, above 0.
        loss_weight: Weight of the method. At 0 every network trains alone.

    Raises:
        ConfigError: If an option is out of range, the teacher is missing,
            there are no other students, or the networks do not fit.
    """

    learns_from: ClassVar[str] = 'peers'

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        temperature: float = 1.0,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        self.check_not_negative(alpha=alpha, beta=beta)
        self.check_positive(temperature=temperature)
        self.alpha, self.beta = alpha, beta
        self.temperature = temperature

    @property
    def student_paths(self) -> Sequence[str]:
        return ('neck',)  # on which RoI heads score the others' RoIs

    @property
    def peer_paths(self) -> Sequence[str]:
        return ('neck',)

    def prepare(self, student: StepRecord, teacher: TeacherView) -> None:
        name = type(self).__name__
        students = self._students(student)
        if self.beta:
            if len(students) < 2:
                raise ConfigError(
                    f'{name}.beta is the weight of other students, but there '
                    'are none: add one to distillation.peers, or set it to 0.'
                )
            check_mutual(students, name)
        if self.alpha:
            source = self._source(student, teacher)
            if not source.each():
                raise ConfigError(
                    f'{name}.alpha is the weight of a teacher, but there is '
                    'none: add distillation.teacher, or set alpha to 0.'
                )
            for each in students.values():
                check_class_logits(each, source, name)

    def forward(
        self,
        student: StepRecord,
        teacher: TeacherView,
        batch: Batch,
    ) -> dict[str, Tensor]:
        students = self._students(student)
        losses = {}
        if self.alpha:
            source = self._source(student, teacher)
            for name, each in students.items():
                pairs = class_logits(each, source, batch.data_samples)
                kd = sum_of([class_kl(p, self.temperature) for p in pairs])
                losses[f'kd_{name}'] = self.alpha * kd
        if self.beta:
            mutual = mutual_losses(
                students, batch.data_samples, self.temperature
            )
            for name, loss in mutual.items():
                losses[f'mutual_{name}'] = self.beta * loss
        return losses

    @staticmethod
    def _source(student: StepRecord, teacher: TeacherView) -> TeacherView:
        """Return the teacher in training, or else the frozen one."""
        if TRAINED_TEACHER in student.peers:
            return as_teacher(student.peers[TRAINED_TEACHER], learns=False)
        return teacher

    def _students(self, student: StepRecord) -> Mapping[str, StepRecord]:
        networks = networks_of(student)
        return {n: o for n, o in networks.items() if n != TRAINED_TEACHER}
