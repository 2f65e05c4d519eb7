"""Box regression that the teacher bounds."""

import torch
from torch import Tensor

from mmkd.registry import MODELS

from .checks import check_not_negative, check_same_shape
from .reduction import Loss


def teacher_bounded_regression_loss(
    pred: Tensor,
    target: Tensor,
    teacher: Tensor,
    weight: Tensor | None = None,
    *,
    margin: float = 0.0,
    bounded: bool = True,
) -> Tensor:
    r"""Regress towards the ground truth until the student beats the teacher.

    .. math::
        L_b = \begin{cases}
            \|R_s - y\|_2^2 & \text{if } \|R_s - y\|_2^2 + m >
            \|R_t - y\|_2^2 \\
            0 & \text{otherwise}
        \end{cases}

    One decision is made for each box, over its 4 deltas together. The
    gradient pulls the student towards the ground truth :math:`y`; the teacher
    only says when to stop, because its unbounded regression can be wrong in
    any direction.

    With ``bounded=False`` it is the paper's baseline, which imitates the
    teacher and does harm (table 4): :math:`\|R_s - R_t\|_2^2` for every box.

    Source: Chen, Choi, Yu, Han, Chandraker, "Learning Efficient Object
    Detection Models with Knowledge Distillation", NeurIPS 2017, eq. 4. The
    paper does not say what its margin :math:`m` is, and its code is not
    public; re-implementations take 0 to 0.5.

    Args:
        pred: The student's deltas, (N, 4).
        target: The ground truth's deltas in the same coding, (N, 4).
        teacher: The teacher's deltas in the same coding, (N, 4); they get no
            gradient.
        weight: Weight of each box, (N,), or of each delta, (N, 4). It does
            not influence the decision.
        margin: By how much the student must be better than the teacher before
            its loss is switched off, in squared deltas, at least 0.
        bounded: False for plain L2 towards the teacher.

    Returns:
        The loss of each box in squared deltas, (N,), float32.

    Raises:
        ConfigError: If the margin is below 0.
        ShapeError: If the shapes differ.

    Example:
        The student's squared error is 5. The first teacher's is 4, so that
        the student learns; the second teacher's is 36, so that it does not.

        >>> import torch
        >>> from mmkd.losses import teacher_bounded_regression_loss
        >>> target = torch.zeros(1, 4)
        >>> student = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
        >>> teachers = torch.ones(1, 4), torch.full((1, 4), 3.0)
        >>> for teacher in teachers:
        ...     teacher_bounded_regression_loss(student, target, teacher)
        tensor([5.])
        tensor([0.])
    """
    check_not_negative('teacher_bounded_regression_loss', margin=margin)
    check_same_shape(
        'teacher_bounded_regression_loss',
        pred=pred,
        target=target,
        teacher=teacher,
    )
    aim = target.float() if bounded else teacher.detach().float()
    squares = (pred.float() - aim).square()
    weighted, of_boxes = squares, weight
    if weight is not None and weight.dim() == 2:
        weighted, of_boxes = squares * weight, None
    loss = weighted.sum(-1)
    if bounded:
        with torch.no_grad():
            error = (teacher.float() - target.float()).square().sum(-1)
            learns = squares.sum(-1) + margin > error
        # where, not a product: 0 * inf would be NaN for a box that is done
        loss = loss.where(learns, 0.0)
    return loss if of_boxes is None else loss * of_boxes


@MODELS.register_module()
class TeacherBoundedRegressionLoss(Loss):
    r"""Weight and reduce :func:`teacher_bounded_regression_loss`.

    Args:
        margin: By how much the student must be better than the teacher before
            its loss is switched off, in squared deltas, at least 0.
        bounded: False for plain L2 towards the teacher.
        reduction: ``'none'``, ``'mean'`` or ``'sum'``.
        loss_weight: Factor of the result, the paper's :math:`\nu`.

    Raises:
        ConfigError: If an option is outside its range.

    Example:
        >>> import torch
        >>> from mmkd.losses import TeacherBoundedRegressionLoss
        >>> loss = TeacherBoundedRegressionLoss()
        >>> target = torch.zeros(1, 4)
        >>> student = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
        >>> loss(student, target, teacher=torch.ones(1, 4))  # 5 / 2
        tensor(2.5000)
    """

    def __init__(
        self,
        *,
        margin: float = 0.0,
        bounded: bool = True,
        reduction: str = 'mean',
        loss_weight: float = 0.5,
    ) -> None:
        super().__init__(reduction=reduction, loss_weight=loss_weight)
        check_not_negative('TeacherBoundedRegressionLoss', margin=margin)
        self.margin, self.bounded = margin, bounded

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        teacher: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Compare the student's deltas with the ground truth's.

        Args:
            pred: The student's deltas, (N, 4).
            target: The ground truth's deltas, (N, 4).
            teacher: The teacher's deltas in the same coding, (N, 4); they get
                no gradient.
            weight: Weight of each box, (N,), or of each delta, (N, 4).
            avg_factor: Divides the sum, in place of the number of boxes.
            reduction_override: Replaces the configured reduction.

        Returns:
            A scalar, or (N,) without reduction.
        """
        loss = teacher_bounded_regression_loss(
            pred,
            target,
            teacher,
            weight,
            margin=self.margin,
            bounded=self.bounded,
        )
        return self.reduce(loss, None, avg_factor, reduction_override)
