"""Box regression that the teacher bounds."""

import torch
from torch import Tensor, nn

from mmkd.registry import MODELS

from .reduction import check_reduction, reduce_loss


@MODELS.register_module()
class TeacherBoundedRegressionLoss(nn.Module):
    r"""L2 towards the ground truth until the student beats the teacher.

    .. math::
        L_b = \begin{cases}
            \|R_s - y\|_2^2 & \text{if } \|R_s - y\|_2^2 + m >
            \|R_t - y\|_2^2 \\
            0 & \text{otherwise}
        \end{cases}

    The gate is decided per box, over its 4 deltas together. The gradient
    pulls the student towards the ground truth :math:`y`; the teacher only
    says when to stop, because its unbounded regression can be wrong in any
    direction.

    Source: Chen, Choi, Yu, Han, Chandraker, "Learning Efficient Object
    Detection Models with Knowledge Distillation", NeurIPS 2017, eq. 4, with
    the weight :math:`\nu = 0.5` (``loss_weight``). The paper does not say
    what its margin :math:`m` is; re-implementations take 0 to 0.5.

    With ``bounded=False`` it is the paper's baseline, which imitates the
    teacher and hurts (table 4): :math:`\|R_s - R_t\|_2^2` for every box.

    Args:
        margin: How much better than the teacher the student must be before
            its loss is switched off, in squared deltas, at least 0.
        bounded: False for plain L2 towards the teacher.
        reduction: ``'none'``, ``'mean'`` or ``'sum'``.
        loss_weight: Factor of the result, the paper's :math:`\nu`.

    Raises:
        ValueError: If an option is outside its range.

    Example:
        >>> loss = TeacherBoundedRegressionLoss(loss_weight=1.0)
        >>> target = torch.zeros(1, 4)
        >>> student = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
        >>> loss(student, target, teacher=torch.ones(1, 4), avg_factor=1)
        tensor(5.0000)
        >>> loss(student, target, teacher=3 * torch.ones(1, 4), avg_factor=1)
        tensor(0.)
    """

    def __init__(
        self,
        *,
        margin: float = 0.0,
        bounded: bool = True,
        reduction: str = 'mean',
        loss_weight: float = 0.5,
    ) -> None:
        super().__init__()
        if margin < 0:
            raise ValueError(f'margin must be at least 0, got {margin}')
        self.margin = margin
        self.bounded = bounded
        self.reduction = check_reduction(reduction)
        self.loss_weight = loss_weight

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        teacher: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Compare the student's deltas with the targets, gated per box.

        Args:
            pred: The student's deltas, (N, 4).
            target: The ground truth's deltas, (N, 4).
            teacher: The teacher's deltas in the same coding, (N, 4); gets no
                gradient.
            weight: Weight of each box, (N,), or of each delta, (N, 4). The
                gate does not see it.
            avg_factor: Divides the sum instead of the number of boxes.
            reduction_override: Replaces the configured reduction.

        Returns:
            A scalar, or (N,) without reduction.
        """
        if not pred.shape == target.shape == teacher.shape:
            raise ValueError(
                'student, target and teacher deltas must have the same '
                f'shape, got {tuple(pred.shape)}, {tuple(target.shape)} and '
                f'{tuple(teacher.shape)}'
            )
        reduction = check_reduction(reduction_override or self.reduction)
        aim = target.float() if self.bounded else teacher.detach().float()
        squares = (pred.float() - aim).square()
        gate = self._gate(squares, teacher, target) if self.bounded else None
        if weight is not None and weight.dim() == 2:
            squares, weight = squares * weight, None
        loss = squares.sum(-1)
        if gate is not None:
            # where, not a product: 0 * inf would be NaN behind a closed gate
            loss = loss.where(gate, 0.0)
        return self.loss_weight * reduce_loss(
            loss, weight, avg_factor, reduction
        )

    @torch.no_grad()
    def _gate(
        self, squares: Tensor, teacher: Tensor, target: Tensor
    ) -> Tensor:
        """Which boxes the student has not yet learnt better, (N,)."""
        teacher_error = (teacher.float() - target.float()).square().sum(-1)
        return squares.sum(-1) + self.margin > teacher_error
