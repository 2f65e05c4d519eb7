"""The reduction that every loss of mmkd shares."""

from mmdet.models.losses.utils import weight_reduce_loss
from torch import Tensor

REDUCTIONS = ('none', 'mean', 'sum')


def check_reduction(reduction: str) -> str:
    """Return ``reduction`` if it is known, raise ``ValueError`` otherwise."""
    if reduction not in REDUCTIONS:
        raise ValueError(
            f'reduction must be one of {REDUCTIONS}, got {reduction!r}'
        )
    return reduction


def reduce_loss(
    loss: Tensor,
    weight: Tensor | None,
    avg_factor: float | Tensor | None,
    reduction: str,
) -> Tensor:
    """Weight and reduce an elementwise loss as MMDetection does.

    An empty ``loss`` gives 0 that still reaches its graph instead of the NaN
    of a mean over nothing.
    """
    if loss.numel() == 0 and reduction == 'mean' and avg_factor is None:
        return loss.sum()
    return weight_reduce_loss(loss, weight, reduction, avg_factor)
