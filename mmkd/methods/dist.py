"""DIST: distillation of relations (Huang et al., NeurIPS 2022)."""

from collections.abc import Sequence

import torch
from mmdet.structures import DetDataSample
from torch import Tensor

from mmkd.core.method import Method
from mmkd.data.batch import Batch
from mmkd.detectors.dense import student_dense
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError
from mmkd.losses import inter_class_loss, intra_class_loss
from mmkd.registry import METHODS
from mmkd.teachers.view import TeacherView
from mmkd.utils import Official, process_share

from .class_logits import (
    CLASS_LOGITS,
    ClassLogits,
    check_class_logits,
    class_logits,
    class_maps,
)

DENSE_FORMS = ('maps', 'priors')


@METHODS.register_module()
class DIST(Method):
    r"""Class probabilities correlate with the teacher's by box and by class.

    .. math::
        L = \beta \frac{T^2}{N} \sum_i (1 - \rho(p^s_{i,:}, p^t_{i,:}))
          + \gamma \frac{T^2}{C} \sum_c (1 - \rho(p^s_{:,c}, p^t_{:,c}))

    where :math:`\rho` is Pearson's correlation over the C columns of a row
    (between classes) and over the N rows of a column (within a class).

    In two-stage detectors, a row is one of the RoIs that the student is
    trained on, with its class probabilities. In one-stage detectors,
    ``dense`` says what a row is:

    * ``'maps'``, as in the authors' code: a row is a position of a level's
      map, with the probabilities of all its priors side by side, so that
      there are C = A K columns for A priors and K classes. All positions
      count, whether there is an object or not. The loss is computed level by
      level, and added up.
    * ``'priors'``: a row is a prior, with its K probabilities, and the levels
      are one set. In sigmoid heads, the rows are the priors assigned to an
      object; in softmax heads all priors, with the weights of the stock loss.

    In softmax heads, :math:`p = \mathrm{softmax}(z / T)` of a prior or a RoI,
    with the background as a column; in sigmoid heads,
    :math:`p = \sigma(z / T)`. Classes that only one of the networks knows are
    left out.

    On unlabelled images, the teacher's confident detections are the objects,
    which decide on the RoIs and on the rows of ``'priors'``.

    The relation between classes is averaged over the rows of all processes.
    As in the paper, the relation within a class spans the rows of all images
    in the batch of a process; ``per_image`` computes it image by image
    instead, and averages over the images that have rows.

    Source: Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A
    Stronger Teacher", NeurIPS 2022, https://arxiv.org/abs/2205.10536, with
    beta = gamma = 1. The paper does not say which boxes of a dense head are
    compared. The code for detection (hunto/MasKD, folder mmrazor) taps the
    last layer of the class branch: these are the maps above, with T = 1. It
    also counts the positions of padding, which are left out here. The factor
    :math:`T^2` is that of the classification code (hunto/DIST_KD). For RoIs,
    which the teacher scores with its own head, the code is the formula above;
    here a relation between classes has the weights of the stock loss, and N
    is averaged over the processes and is at least 1, as it is with
    ``'priors'``. Softmax heads with priors do not occur in the code.

    Args:
        beta: Weight of the relation between classes, at least 0.
        gamma: Weight of the relation within classes, at least 0.
        temperature: T, above 0.
        per_image: Relate the rows of each image alone.
        dense: What is compared in dense heads, ``'maps'`` or ``'priors'``.
        loss_weight: Weight of the method.

    Raises:
        ConfigError: If an option is outside its range, the pair's heads
            differ in kind or in priors, or fewer than two columns remain.
    """

    needs = (CLASS_LOGITS,)
    needs_labels = False
    reads_objects = True
    official = (
        Official(
            code='https://github.com/hunto/MasKD/tree/main/mmrazor',
            compared='tests/methods/test_dist.py::TestOfficialCode',
            options=dict(dense='maps', beta=1.0, gamma=1.0, temperature=1.0),
            config='dist_retinanet_r50.py',
            ap='RetinaNet X101→R50, 2x: 37.4→39.8',
            differs='positions in the padding are left out',
        ),
    )

    def __init__(
        self,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        per_image: bool = False,
        dense: str = 'maps',
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        self.check_not_negative(beta=beta, gamma=gamma)
        self.check_positive(temperature=temperature)
        self.check_choice(DENSE_FORMS, dense=dense)
        self.beta, self.gamma = beta, gamma
        self.temperature = temperature
        self.per_image = per_image
        self.dense = dense

    def prepare(self, student: StepRecord, teacher: TeacherView) -> None:
        check_class_logits(student, teacher, 'DIST')

    def forward(
        self,
        student: StepRecord,
        teacher: TeacherView,
        batch: Batch,
    ) -> dict[str, Tensor]:
        samples = batch.data_samples
        if self.dense == 'maps' and not student.facts.is_two_stage:
            return self._of_maps(student, teacher, samples)
        losses: dict[str, Tensor] = {}
        for pair in class_logits(student, teacher, samples):
            self._check_columns(pair.student, teacher)
            if pair.sigmoid:
                pair = pair.objects()
            ours = self._probabilities(pair.student, pair.sigmoid)
            theirs = self._probabilities(pair.teacher, pair.sigmoid).detach()
            inter = (pair.weights * inter_class_loss(ours, theirs)).sum()
            inter = inter / process_share(pair.weights.sum(), least=1)
            groups, number = pair.images, len(samples)
            if not self.per_image:
                groups, number = torch.zeros_like(groups), 1
            intra = intra_class_loss(
                ours, theirs, pair.weights, groups, number
            )
            if self.per_image:
                intra = intra * _share_of_images(pair, number)
            losses |= self._weighted(inter, intra, pair.prefix, pair.scale)
        return losses

    def _of_maps(
        self,
        student: StepRecord,
        teacher: TeacherView,
        data_samples: Sequence[DetDataSample],
    ) -> dict[str, Tensor]:
        """Relate the positions of each level."""
        inter, intra, numbers = [], [], []
        sigmoid = student_dense(student).sigmoid
        for level in class_maps(student, teacher, data_samples):
            images = [level.images(z) for z in (level.student, level.teacher)]
            ours, theirs = (
                self._probabilities(torch.cat(parts), sigmoid).flatten(1)
                for parts in images
            )
            self._check_columns(ours, teacher)
            inter.append(inter_class_loss(ours, theirs).sum())
            sizes = [len(part) for part in images[0]]
            numbers.append(len(ours))
            if not self.per_image:
                sizes = numbers[-1:]
            each = [
                intra_class_loss(*parts)
                for parts in zip(
                    ours.split(sizes), theirs.split(sizes), strict=True
                )
            ]
            intra.append(torch.stack(each).mean())
        counts = torch.tensor(numbers).to(inter[0].device, non_blocking=True)
        rows = process_share(counts)
        return self._weighted(
            (torch.stack(inter) / rows).sum(), torch.stack(intra).sum()
        )

    def _weighted(
        self, inter: Tensor, intra: Tensor, prefix: str = '', scale: float = 1
    ) -> dict[str, Tensor]:
        scale = scale * self.temperature**2
        return {
            f'{prefix}inter': self.beta * scale * inter,
            f'{prefix}intra': self.gamma * scale * intra,
        }

    def _check_columns(self, rows: Tensor, teacher: TeacherView) -> None:
        if rows.shape[1] < 2:
            raise ConfigError(
                'DIST relates classes; the networks share '
                f'{len(teacher.class_map.shared)} and no background column. '
                'Use mmkd.KD.'
            )

    def _probabilities(self, logits: Tensor, sigmoid: bool) -> Tensor:
        logits = logits.float() / self.temperature
        return logits.sigmoid() if sigmoid else logits.softmax(-1)


def _share_of_images(pair: ClassLogits, images: int) -> Tensor:
    """Return this process's images that have rows, by the processes' mean."""
    weights = pair.weights.new_zeros(images)
    weights = weights.index_add(0, pair.images, pair.weights)
    number = (weights > 0).sum()
    return number / process_share(number, least=1)
