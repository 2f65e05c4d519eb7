"""DIST: distillation of relations (Huang et al., NeurIPS 2022)."""

import torch
from mmdet.utils import reduce_mean
from torch import Tensor

from mmkd.core.method import Method
from mmkd.data.batch import Batch
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError
from mmkd.losses import inter_class_loss, intra_class_loss
from mmkd.registry import METHODS
from mmkd.teachers.view import TeacherView

from .class_logits import CLASS_LOGITS, check_class_logits, class_logits


@METHODS.register_module()
class DIST(Method):
    r"""Class probabilities correlate with the teacher's by box and by class.

    .. math::
        L = \beta \frac{T^2}{N} \sum_i (1 - \rho(p^s_{i,:}, p^t_{i,:}))
          + \gamma \frac{T^2}{C} \sum_c (1 - \rho(p^s_{:,c}, p^t_{:,c}))

    where :math:`\rho` is Pearson's correlation over the C columns of a box
    (between classes) and over the N boxes of a column (within a class).

    In softmax heads, :math:`p = \mathrm{softmax}(z / T)` with the background
    as a column, and the boxes are those that the student is trained on: all
    sampled RoIs, or all priors with the weights of the stock loss. In sigmoid
    heads, :math:`p = \sigma(z / T)`, and the boxes are those assigned to an
    object, because the differences between the classes of a background prior
    are noise. Classes that only one of the networks knows are left out.

    As in the paper, the relation within a class spans the boxes of all
    images in the batch of a process; ``per_image`` computes it image by image
    instead, and averages over the images that have boxes. In the relation
    between classes, N is averaged over the processes and is at least 1.

    Source: Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A
    Stronger Teacher", NeurIPS 2022, https://arxiv.org/abs/2205.10536, with
    beta = gamma = 1; the factor :math:`T^2` is that of its classification
    code (UNVERIFIED for detectors, T is 1 there). Which boxes of a sigmoid
    head are compared is UNVERIFIED: the code for detectors is not public in
    the official repository (hunto/DIST_KD), and the choice is ours.

    Args:
        beta: Weight of the relation between classes, at least 0.
        gamma: Weight of the relation within classes, at least 0.
        temperature: T, above 0.
        per_image: Relate the boxes of each image alone.
        loss_weight: Weight of the method.

    Raises:
        ConfigError: If an option is outside its range, the pair's heads
            differ in kind or in priors, or fewer than two columns remain.
    """

    needs = (CLASS_LOGITS,)

    def __init__(
        self,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        per_image: bool = False,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        self.check_not_negative(beta=beta, gamma=gamma)
        self.check_positive(temperature=temperature)
        self.beta, self.gamma = beta, gamma
        self.temperature = temperature
        self.per_image = per_image

    def prepare(self, student: StepRecord, teacher: TeacherView) -> None:
        check_class_logits(student, teacher, 'DIST')

    def forward(
        self,
        student: StepRecord,
        teacher: TeacherView,
        batch: Batch,
    ) -> dict[str, Tensor]:
        losses = {}
        for pair in class_logits(student, teacher, batch.data_samples):
            if pair.student.shape[1] < 2:
                raise ConfigError(
                    'DIST relates classes; the networks share '
                    f'{pair.classes} and no background column. Use mmkd.KD.'
                )
            if pair.sigmoid:
                pair = pair.objects()
            ours = self._probabilities(pair.student, pair.sigmoid)
            theirs = self._probabilities(pair.teacher, pair.sigmoid).detach()
            inter = (pair.weights * inter_class_loss(ours, theirs)).sum()
            inter = inter / reduce_mean(pair.weights.sum()).clamp(min=1)
            groups, number = pair.images, len(batch.data_samples)
            if not self.per_image:
                groups, number = torch.zeros_like(groups), 1
            intra = intra_class_loss(
                ours, theirs, pair.weights, groups, number
            )
            scale = pair.scale * self.temperature**2
            losses[f'{pair.prefix}inter'] = self.beta * scale * inter
            losses[f'{pair.prefix}intra'] = self.gamma * scale * intra
        return losses

    def _probabilities(self, logits: Tensor, sigmoid: bool) -> Tensor:
        logits = logits.float() / self.temperature
        return logits.sigmoid() if sigmoid else logits.softmax(-1)
