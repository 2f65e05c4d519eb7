"""Weighted cross-entropy with a teacher's soft labels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.registry import MODELS

from .checks import check_not_negative, check_positive, check_same_shape
from .reduction import PairLoss


def weighted_soft_cross_entropy_loss(
    pred: Tensor,
    target: Tensor,
    *,
    background_weight: float = 1.5,
    temperature: float = 1.0,
    use_sigmoid: bool = False,
) -> Tensor:
    r"""Compute the cross-entropy with soft labels, heavier on background.

    .. math::
        L_{soft} = -\sum_c w_c \, p_{t,c} \log p_{s,c}, \qquad
        p = \mathrm{softmax}(z / T)

    with :math:`w_c` = ``background_weight`` for the background, which is the
    *last* class as in MMDetection, and 1 for all others. The weight stands
    inside the sum: it belongs to a class, not to a sample. With
    ``use_sigmoid`` every column :math:`z_c` is a two-class problem with the
    logits :math:`(z_c, 0)`: the class against the background.

    Source: Chen, Choi, Yu, Han, Chandraker, "Learning Efficient Object
    Detection Models with Knowledge Distillation", NeurIPS 2017, eq. 3, with
    :math:`w_{bg} = 1.5` and :math:`T = 1`. As in the paper, no factor
    :math:`T^2` balances the gradient at other temperatures: put it into
    ``loss_weight``. The authors' code is not public.

    Args:
        pred: The student's logits, (..., C).
        target: The teacher's logits, same shape; they get no gradient.
        background_weight: Weight of the background class, at least 0.
        temperature: T, above 0; divides both networks' logits.
        use_sigmoid: The columns are independent binary problems.

    Returns:
        The loss of each sample in nats, (...), at least 0, float32.

    Raises:
        ConfigError: If an option is outside its range.
        ShapeError: If the shapes differ.

    Example:
        The student knows nothing; the teacher is sure of the background in
        the first sample and of the object in the second. The losses are
        1.5 log(2) and log(2).

        >>> import torch
        >>> from mmkd.losses import weighted_soft_cross_entropy_loss
        >>> teacher = torch.tensor([[0.0, 100.0], [100.0, 0.0]])
        >>> weighted_soft_cross_entropy_loss(torch.zeros(2, 2), teacher)
        tensor([1.0397, 0.6931])
    """
    where = 'weighted_soft_cross_entropy_loss'
    check_positive(where, temperature=temperature)
    check_not_negative(where, background_weight=background_weight)
    remedy = 'Select the classes that both networks have first.'
    check_same_shape(where, remedy, pred=pred, target=target)
    student = pred.float() / temperature
    teacher = target.detach().float() / temperature
    if use_sigmoid:
        # log p(class) = logsigmoid(z), log p(background) = logsigmoid(-z)
        loss = -(
            teacher.sigmoid() * F.logsigmoid(student)
            + background_weight
            * teacher.neg().sigmoid()
            * F.logsigmoid(student.neg())
        )
    else:
        loss = -teacher.softmax(-1) * student.log_softmax(-1)
        loss = torch.cat(
            [loss[..., :-1], background_weight * loss[..., -1:]], dim=-1
        )
    return loss.sum(-1)


@MODELS.register_module()
class WeightedSoftCrossEntropyLoss(PairLoss):
    """Weight and reduce :func:`weighted_soft_cross_entropy_loss`.

    Args:
        background_weight: Weight of the background class, at least 0.
        temperature: Divides both networks' logits, above 0.
        use_sigmoid: The columns are independent binary problems.
        reduction: ``'none'``, ``'mean'`` or ``'sum'``.
        loss_weight: Factor of the result.

    Raises:
        ConfigError: If an option is outside its range.

    Example:
        >>> import torch
        >>> from mmkd.losses import WeightedSoftCrossEntropyLoss
        >>> loss = WeightedSoftCrossEntropyLoss(background_weight=1.5)
        >>> student = torch.zeros(1, 2)
        >>> teacher = torch.tensor([[0.0, 100.0]])  # surely background
        >>> loss(student, teacher)  # 1.5 log(2)
        tensor(1.0397)
    """

    def __init__(
        self,
        *,
        background_weight: float = 1.5,
        temperature: float = 1.0,
        use_sigmoid: bool = False,
        reduction: str = 'mean',
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(reduction=reduction, loss_weight=loss_weight)
        where = 'WeightedSoftCrossEntropyLoss'
        check_positive(where, temperature=temperature)
        check_not_negative(where, background_weight=background_weight)
        self.background_weight = background_weight
        self.temperature = temperature
        self.use_sigmoid = use_sigmoid

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        """Compare logits, (..., C), by sample, (...)."""
        return weighted_soft_cross_entropy_loss(
            pred,
            target,
            background_weight=self.background_weight,
            temperature=self.temperature,
            use_sigmoid=self.use_sigmoid,
        )
