"""Knowledge distillation of class logits (Hinton et al., 2015)."""

from torch import Tensor

from mmkd.core.method import Method
from mmkd.data.batch import Batch
from mmkd.detectors.record import StepRecord
from mmkd.losses.kl import sigmoid_kl, softmax_kl
from mmkd.registry import METHODS
from mmkd.teachers.view import TeacherView

from .class_logits import (
    CLASS_LOGITS,
    ClassLogits,
    check_class_logits,
    class_logits,
)


@METHODS.register_module()
class KD(Method):
    r"""The student's class probabilities approach the teacher's.

    .. math::
        L = \frac{T^2}{N} \sum_i w_i \, \mathrm{KL}(p^t_i \| p^s_i)

    A softmax head has :math:`p = \mathrm{softmax}(z / T)` over classes and
    background. In a sigmoid head every class is a binary problem with
    :math:`p = \sigma(z / T)`, and the divergence is the sum over them.

    * In one-stage detectors, i runs over all priors. :math:`w_i` is the
      weight that the student's own loss gives to the prior's classification
      (0 in the padding, for ignored priors, and in YOLOv3 and YOLOX for all
      but the positives). N is the number of its positives. The priors of the
      heads must correspond. SSD and YOLACT use all negatives, not only the
      mined ones; FSAF uses the priors of its objects on all levels, before it
      selects one.
    * In two-stage detectors, i runs over the N RoIs that the student is
      trained on, which the teacher scores on its own features. A cascade is
      distilled stage by stage, with the stage's weight.

    N is averaged over the processes. In all of them together it is at least
    1, so that their gradient is that of one process with the whole batch.

    Classes that only one of the networks knows are left out.

    On unlabelled images, the teacher's confident detections take the place of
    the objects: N counts the positives that the student's own assignment finds
    for them, and a RoI head samples its RoIs by them. The targets are the
    teacher's probabilities as ever.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural
    Network", 2015, https://arxiv.org/abs/1503.02531. It is not about
    detectors: the sum over binary problems and the normaliser N, which is
    that of the stock losses, are ours.

    Args:
        temperature: T, above 0. With a T above 1, the many background priors
            of a sigmoid head weigh more.
        loss_weight: Weight of the method.

    Raises:
        ConfigError: If the temperature is not above 0, or the pair's heads
            differ in kind or in priors.
    """

    needs = (CLASS_LOGITS,)
    needs_labels = False
    reads_objects = True

    def __init__(
        self, *, temperature: float = 1.0, loss_weight: float = 1.0
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        self.check_positive(temperature=temperature)
        self.temperature = temperature

    def prepare(self, student: StepRecord, teacher: TeacherView) -> None:
        check_class_logits(student, teacher, 'KD')

    def forward(
        self,
        student: StepRecord,
        teacher: TeacherView,
        batch: Batch,
    ) -> dict[str, Tensor]:
        return {
            f'{pair.prefix}cls': class_kl(pair, self.temperature)
            for pair in class_logits(student, teacher, batch.data_samples)
        }


def class_kl(pair: ClassLogits, temperature: float) -> Tensor:
    """Return the loss of :class:`KD` for one pair of logits, a scalar."""
    if pair.sigmoid:
        return pair.average_of(
            lambda ours, theirs: sigmoid_kl(ours, theirs, temperature).sum(-1)
        )
    return pair.average_of(
        lambda ours, theirs: softmax_kl(ours, theirs, temperature)
    )
