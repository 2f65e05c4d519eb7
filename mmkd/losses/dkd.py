"""Decoupled knowledge distillation of logits (Zhao et al., CVPR 2022)."""

from torch import Tensor

from mmkd.errors import ShapeError
from mmkd.registry import MODELS

from .checks import (
    check_axes,
    check_not_negative,
    check_positive,
    check_same_shape,
)
from .kl import sigmoid_kl, softmax_kl
from .reduction import Loss


def dkd_parts(
    pred: Tensor,
    target: Tensor,
    label: Tensor,
    *,
    temperature: float = 1.0,
    use_sigmoid: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Compute the divergences of the target class and of the others.

    .. math::
        TCKD &= T^2 \, \mathrm{KL}\left((p^t_y, 1 - p^t_y) \,\|\,
            (p^s_y, 1 - p^s_y)\right), \qquad p = \mathrm{softmax}(z / T) \\
        NCKD &= T^2 \, \mathrm{KL}(\hat p^t \| \hat p^s), \qquad
            \hat p = \mathrm{softmax}_{c \ne y}(z_c / T)

    with y the sample's label. With ``use_sigmoid``, :math:`p_y = \sigma(z_y /
    T)` is the target's own binary probability and NCKD stays as it is.

    Source: Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation",
    CVPR 2022, https://arxiv.org/abs/2203.08679. The official code
    (megvii-research/mdistiller) subtracts 1000 from the target's scaled logit
    to take it out of NCKD's softmax; here a constant replaces it. The binary
    form is ours.

    Args:
        pred: The student's logits, (N, C).
        target: The teacher's logits, same shape; they get no gradient.
        label: The label of each sample, (N,), from 0 to C - 1.
        temperature: T, above 0.
        use_sigmoid: The columns are independent binary problems.

    Returns:
        TCKD and NCKD of each sample in nats times :math:`T^2`, (N,) each, at
        least 0, float32.

    Raises:
        ConfigError: If the temperature is not above 0.
        ShapeError: If the tensors have other axes, differ in shape, or have
            fewer than 3 columns: without two other classes NCKD is 0.

    Example:
        The target's probability is 1/2 in the student and 3/4 in the teacher;
        the other classes are equally likely in both.

        >>> import torch
        >>> from mmkd.losses import dkd_parts
        >>> student = torch.tensor([[2.0, 1.0, 1.0]]).log()
        >>> teacher = torch.tensor([[6.0, 1.0, 1.0]]).log()
        >>> target, others = dkd_parts(
        ...     student, teacher, torch.tensor([0]), temperature=1.0
        ... )
        >>> target  # 3/4 log(3/2) + 1/4 log(1/2)
        tensor([0.1308])
        >>> others
        tensor([0.])
    """
    check_positive('dkd_parts', temperature=temperature)
    check_axes('dkd_parts', pred, 'N C')
    remedy = 'Select the classes that both networks have first.'
    check_same_shape('dkd_parts', remedy, pred=pred, target=target)
    if pred.shape[1] < 3 or label.shape != pred.shape[:1]:
        raise ShapeError(
            'dkd_parts needs logits (N, C) of at least 3 classes and a label '
            f'for each sample (N,), got {tuple(pred.shape)} and '
            f'{tuple(label.shape)}.'
        )
    (p_s, q_s), (p_t, q_t) = (
        _split(z.float(), label[:, None], temperature, use_sigmoid)
        for z in (pred, target)
    )
    return (
        sigmoid_kl(p_s, p_t, temperature)[:, 0],
        softmax_kl(q_s, q_t, temperature),
    )


def _split(
    logits: Tensor, label: Tensor, temperature: float, sigmoid: bool
) -> tuple[Tensor, Tensor]:
    """Return the target's binary logit (N, 1) and the others' logits (N, C).

    Args:
        logits: (N, C) of one network.
        label: (N, 1), 0..C-1.
        temperature: T.
        sigmoid: Whether the logits are binary ones.
    """
    target = logits.gather(1, label)
    # Out of the softmax, and finite: the difference of two is needed.
    others = logits.scatter(1, label, -1e4 * temperature)
    if not sigmoid:
        # softmax's p_y is the sigmoid of z_y - log sum exp of the others
        log_sum = (others / temperature).logsumexp(1, keepdim=True)
        target = target - temperature * log_sum
    return target, others


@MODELS.register_module()
class DKDLoss(Loss):
    r"""Weight, add and reduce :func:`dkd_parts`, which DKD uses.

    The loss of a sample is :math:`\alpha \, TCKD + \beta \, NCKD`. The
    defaults are those of the official code for detectors; most of the paper's
    classifiers have alpha 1, beta 8 and T 4.

    Args:
        alpha: Weight of the target class' part, at least 0.
        beta: Weight of the other classes' part, at least 0.
        temperature: T, above 0.
        use_sigmoid: The columns are independent binary problems.
        reduction: ``'none'``, ``'mean'`` or ``'sum'``.
        loss_weight: Factor of the result.

    Raises:
        ConfigError: If an option is outside its range.

    Example:
        >>> import torch
        >>> from mmkd.losses import DKDLoss
        >>> loss = DKDLoss(alpha=2.0, temperature=1.0)
        >>> student = torch.tensor([[2.0, 1.0, 1.0]]).log()
        >>> teacher = torch.tensor([[6.0, 1.0, 1.0]]).log()
        >>> loss(student, teacher, label=torch.tensor([0]))
        tensor(0.2616)
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 0.25,
        temperature: float = 1.0,
        use_sigmoid: bool = False,
        reduction: str = 'mean',
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(reduction=reduction, loss_weight=loss_weight)
        check_not_negative('DKDLoss', alpha=alpha, beta=beta)
        check_positive('DKDLoss', temperature=temperature)
        self.alpha, self.beta = alpha, beta
        self.temperature, self.use_sigmoid = temperature, use_sigmoid

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Compare the student's logits with the teacher's.

        Args:
            pred: The student's logits, (N, C).
            target: The teacher's logits, same shape; they get no gradient.
            label: The label of each sample, (N,), from 0 to C - 1.
            weight: Weight of each sample, (N,).
            avg_factor: Divides the sum, in place of the number of samples.
            reduction_override: Replaces the configured reduction.

        Returns:
            A scalar, or (N,) without reduction.
        """
        own, others = dkd_parts(
            pred,
            target,
            label,
            temperature=self.temperature,
            use_sigmoid=self.use_sigmoid,
        )
        loss = self.alpha * own + self.beta * others
        return self.reduce(loss, weight, avg_factor, reduction_override)
