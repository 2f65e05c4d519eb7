"""Weighted cross-entropy with a teacher's soft labels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.registry import MODELS

from .reduction import check_reduction, reduce_loss


@MODELS.register_module()
class WeightedSoftCrossEntropyLoss(nn.Module):
    r"""Cross-entropy with a teacher's probabilities, heavier on background.

    .. math::
        L_{soft} = -\sum_c w_c \, p_{t,c} \log p_{s,c}, \qquad
        p = \mathrm{softmax}(z / T)

    with :math:`w_c` = ``background_weight`` for the background, the *last*
    class as in MMDetection, and 1 for all others. The weight stands inside
    the sum, per class, not per sample. With ``use_sigmoid`` every column
    :math:`z_c` is a two-class problem of its own, the logits being
    :math:`(z_c, 0)`: the class against the background.

    Source: Chen, Choi, Yu, Han, Chandraker, "Learning Efficient Object
    Detection Models with Knowledge Distillation", NeurIPS 2017, eq. 3, with
    :math:`w_{bg} = 1.5` and :math:`T = 1`. As there, no :math:`T^2` factor
    balances the gradient of other temperatures: put it into ``loss_weight``.

    Args:
        background_weight: Weight of the background class, at least 0.
        temperature: Divides both networks' logits, above 0.
        use_sigmoid: Columns are independent binary problems.
        reduction: ``'none'``, ``'mean'`` or ``'sum'``.
        loss_weight: Factor of the result.

    Raises:
        ValueError: If an option is outside its range.

    Example:
        >>> loss = WeightedSoftCrossEntropyLoss(background_weight=1.5)
        >>> student = torch.zeros(1, 2)
        >>> teacher = torch.tensor([[0.0, 100.0]])  # surely background
        >>> loss(student, teacher)  # 1.5 * log(2)
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
        super().__init__()
        if temperature <= 0:
            raise ValueError(f'temperature must be above 0, got {temperature}')
        if background_weight < 0:
            raise ValueError(
                f'background_weight must be at least 0, '
                f'got {background_weight}'
            )
        self.background_weight = background_weight
        self.temperature = temperature
        self.use_sigmoid = use_sigmoid
        self.reduction = check_reduction(reduction)
        self.loss_weight = loss_weight

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Compare the student's logits with the teacher's.

        Args:
            pred: The student's logits, (N, C) or (..., C).
            target: The teacher's logits, same shape; gets no gradient.
            weight: Weight of each sample, (N,) or (...).
            avg_factor: Divides the sum instead of the number of samples.
            reduction_override: Replaces the configured reduction.

        Returns:
            A scalar, or (N,) or (...) without reduction.
        """
        if pred.shape != target.shape:
            raise ValueError(
                'student and teacher logits must have the same shape, got '
                f'{tuple(pred.shape)} and {tuple(target.shape)}: map the '
                'classes first'
            )
        reduction = check_reduction(reduction_override or self.reduction)
        student = pred.float() / self.temperature
        teacher = target.detach().float() / self.temperature
        if self.use_sigmoid:
            # log p(class) = logsigmoid(z), log p(background) = logsigmoid(-z)
            loss = -(
                teacher.sigmoid() * F.logsigmoid(student)
                + self.background_weight
                * teacher.neg().sigmoid()
                * F.logsigmoid(student.neg())
            )
        else:
            loss = -teacher.softmax(-1) * student.log_softmax(-1)
            loss = torch.cat(
                [loss[..., :-1], self.background_weight * loss[..., -1:]],
                dim=-1,
            )
        loss = reduce_loss(loss.sum(-1), weight, avg_factor, reduction)
        return self.loss_weight * loss
