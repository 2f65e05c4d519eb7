"""The base of the loss modules: a reduction and a weight."""

from mmdet.models.losses.utils import weight_reduce_loss
from torch import Tensor, nn

from mmkd.errors import ConfigError

from .checks import check_choice

REDUCTIONS = ('none', 'mean', 'sum')


class Loss(nn.Module):
    """A module that reduces and weights what a pure function computes.

    Args:
        reduction: ``'none'``, ``'mean'`` or ``'sum'``.
        loss_weight: Factor of the result.

    Raises:
        ConfigError: If the reduction is unknown.
    """

    def __init__(
        self, *, reduction: str = 'mean', loss_weight: float = 1.0
    ) -> None:
        super().__init__()
        check_choice(type(self).__name__, REDUCTIONS, reduction=reduction)
        self.reduction, self.loss_weight = reduction, loss_weight

    def reduce(
        self,
        loss: Tensor,
        weight: Tensor | None,
        avg_factor: float | Tensor | None,
        reduction_override: str | None,
    ) -> Tensor:
        """Weight and reduce a loss as MMDetection does.

        Args:
            loss: The loss of each element.
            weight: Weights that broadcast to the loss.
            avg_factor: Divides the sum, in place of the number of elements.
            reduction_override: Replaces the configured reduction.

        Returns:
            A scalar, or the shape of ``loss`` without reduction. The mean of
            no elements is 0, with a gradient, and not NaN.

        Raises:
            ConfigError: If the reduction is unknown, or is ``'sum'`` where an
                ``avg_factor`` is given.
        """
        name = type(self).__name__
        reduction = reduction_override or self.reduction
        check_choice(name, REDUCTIONS, reduction=reduction)
        if reduction == 'sum' and avg_factor is not None:
            raise ConfigError(
                f'{name}: avg_factor can not be used with '
                "reduction='sum', which does not average. Use 'mean'."
            )
        if loss.numel() == 0 and reduction == 'mean' and avg_factor is None:
            return self.loss_weight * loss.sum()
        reduced = weight_reduce_loss(loss, weight, reduction, avg_factor)
        return self.loss_weight * reduced


class PairLoss(Loss):
    """A loss that needs only the student's tensor and the teacher's."""

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Weight and reduce :meth:`compute`.

        Args:
            pred: The student's tensor, of a shape that :meth:`compute` takes.
            target: The teacher's, same shape; it gets no gradient.
            weight: Weights that broadcast to what :meth:`compute` returns.
            avg_factor: Divides the sum, in place of the number of its
                elements.
            reduction_override: Replaces the configured reduction.

        Returns:
            A scalar, or what :meth:`compute` returns without reduction.
        """
        loss = self.compute(pred, target)
        return self.reduce(loss, weight, avg_factor, reduction_override)

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each element or sample."""
        raise NotImplementedError
