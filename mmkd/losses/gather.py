"""Tensors of all processes, with the gradient that comes back to each."""

from typing import Any

import torch
from mmengine.dist import get_rank, get_world_size
from torch import Tensor
from torch.autograd import Function


def gather_rows(rows: Tensor) -> Tensor:
    """Join the rows of all processes, in the order of their ranks.

    The gradient of a row is the sum of what all processes derive from it. As
    distributed training averages the gradients of the processes, a loss that
    each of them averages over its own rows has the gradient that one process
    computes from the whole batch.

    Args:
        rows: (n, D); every process gives as many, and calls this.

    Returns:
        (R n, D) for R processes; ``rows`` itself for a single one.

    Example:
        >>> import torch
        >>> from mmkd.losses.gather import gather_rows
        >>> gather_rows(torch.ones(2, 3)).shape  # a single process
        torch.Size([2, 3])
    """
    return rows if get_world_size() == 1 else _Gather.apply(rows)


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        parts = [torch.empty_like(rows) for _ in range(get_world_size())]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total[get_rank() * ctx.count :][: ctx.count]
