"""Decoupled knowledge distillation (Zhao et al., CVPR 2022)."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from mmkd.core.method import Method
from mmkd.data.batch import Batch
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError
from mmkd.losses import dkd_parts
from mmkd.registry import METHODS
from mmkd.teachers.view import TeacherView
from mmkd.utils import Official

from .class_logits import (
    CLASS_LOGITS,
    ClassLogits,
    check_class_logits,
    class_logits,
)


@METHODS.register_module()
class DKD(Method):
    r"""KD with the target class and the other classes decoupled.

    .. math::
        L = \frac{1}{N} \sum_i w_i (\alpha \, TCKD_i + \beta \, NCKD_i)

    with y the label of box i and T the temperature:

    .. math::
        TCKD &= T^2 \, \mathrm{KL}\left((p^t_y, 1 - p^t_y) \,\|\,
            (p^s_y, 1 - p^s_y)\right), \qquad p = \mathrm{softmax}(z / T) \\
        NCKD &= T^2 \, \mathrm{KL}(\hat p^t \| \hat p^s), \qquad
            \hat p = \mathrm{softmax}_{c \ne y}(z_c / T)

    In softmax heads (RoI heads, SSD), i, :math:`w_i` and N are those of
    :class:`KD`, and the background is a class. Boxes of classes that the
    teacher does not know are left out.

    Sigmoid heads have no distribution over classes, and their background has
    no target. There i runs over the boxes assigned to an object,
    :math:`p_y = \sigma(z_y / T)` is the target's own binary probability, and
    NCKD is unchanged: the softmax over the logits of the other classes, in
    which the target's logit does not occur. This extension is ours.

    Source: Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation",
    CVPR 2022, https://arxiv.org/abs/2203.08679. The defaults are those of the
    official code for detectors (megvii-research/mdistiller, ``detection/``),
    which distils the RoI head of Faster R-CNN on COCO, and averages over all
    sampled RoIs. Most of the paper's classifiers have alpha 1, beta 8 and T 4.

    Args:
        alpha: Weight of the target class' part, at least 0.
        beta: Weight of the other classes' part, at least 0.
        temperature: T, above 0.
        loss_weight: Weight of the method.

    Raises:
        ConfigError: If an option is outside its range, the pair's heads
            differ in kind or in priors, or there are fewer than two
            classes besides the target.
    """

    official: ClassVar[Sequence[Official]] = (
        Official(
            code='https://github.com/megvii-research/mdistiller/tree/master/'
            'detection',
            compared='tests/methods/test_dkd.py::TestOfficialCode',
            options=dict(
                alpha=1.0, beta=0.25, temperature=1.0, loss_weight=1.0
            ),
        ),
    )

    needs = (CLASS_LOGITS,)

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 0.25,
        temperature: float = 1.0,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        self.check_not_negative(alpha=alpha, beta=beta)
        self.check_positive(temperature=temperature)
        self.alpha, self.beta = alpha, beta
        self.temperature = temperature

    def prepare(self, student: StepRecord, teacher: TeacherView) -> None:
        check_class_logits(student, teacher, 'DKD')

    def forward(
        self,
        student: StepRecord,
        teacher: TeacherView,
        batch: Batch,
    ) -> dict[str, Tensor]:
        losses = {}
        for pair in class_logits(student, teacher, batch.data_samples):
            self._check_others(pair)
            pair = pair.objects() if pair.sigmoid else pair.labelled()
            target, others = dkd_parts(
                pair.student,
                pair.teacher,
                pair.labels,
                temperature=self.temperature,
                use_sigmoid=pair.sigmoid,
            )
            losses[f'{pair.prefix}target'] = self.alpha * pair.average(target)
            losses[f'{pair.prefix}others'] = self.beta * pair.average(others)
        return losses

    def _check_others(self, pair: ClassLogits) -> None:
        columns = pair.student.shape[1]
        if columns < 3:
            raise ConfigError(
                f'DKD needs at least two classes besides the target; the '
                f'networks share {pair.classes} and '
                f'{"a" if columns > pair.classes else "no"} background '
                'column. Use mmkd.KD.'
            )
