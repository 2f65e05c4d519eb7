"""Sums of a loss over all priors, whose memory does not grow with them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

RowLoss = Callable[[Tensor, Tensor], Tensor]
"""From a student's and a teacher's logits, (n, C) each, to losses (n,)."""
ELEMENTS = {'cpu': 2**18, 'cuda': 2**24}
"""The logits in a chunk: few passes through main memory, or few kernels."""


def sum_in_chunks(
    loss: RowLoss,
    pred: Sequence[Tensor],
    target: Sequence[Tensor],
    weight: Tensor,
    columns: tuple[int, int],
) -> Tensor:
    r"""Sum the weighted losses of all priors, a part of a level at a time.

    .. math:: \sum_{b, i} w_{bi} \, L(z^s_{bi}, z^t_{bi})

    Each chunk's gradient is computed with its loss, so that nothing else of
    the size of the logits is ever kept.

    Args:
        loss: The loss of each prior, which does not depend on the others.
        pred: The student's logits: maps (B, A * C, H, W), a level each, in
            which the classes of a prior lie together, or rows (B, n, C).
        target: The teacher's in the same form; they get no gradient.
        weight: Weights (B, N) of the priors in MMDetection's order: level,
            row, column, prior at a point. They get no gradient.
        columns: The student's and the teacher's C.

    Returns:
        The sum, a scalar, float32.

    Example:
        >>> import torch
        >>> from mmkd.losses import sigmoid_kl
        >>> from mmkd.losses.chunks import sum_in_chunks
        >>> student = [torch.zeros(1, 80, 2, 3)]
        >>> teacher = [torch.full((1, 80, 2, 3), 100.0)]
        >>> weight = torch.full((1, 6), 1 / 6)
        >>> sum_in_chunks(  # 80 log 2
        ...     lambda s, t: sigmoid_kl(s, t).sum(-1),
        ...     student,
        ...     teacher,
        ...     weight,
        ...     (80, 80),
        ... )
        tensor(55.4518)
    """
    target = [level.detach() for level in target]
    return _Sum.apply(loss, columns, weight.detach(), *pred, *target)


class _Sum(Function):
    @staticmethod
    def forward(
        ctx: Any,
        loss: RowLoss,
        columns: tuple[int, int],
        weight: Tensor,
        *maps: Tensor,
    ) -> Tensor:
        half = len(maps) // 2
        learns = any(ctx.needs_input_grad[3 : 3 + half])
        ctx.dtypes = [level.dtype for level in maps[:half]] if learns else []
        found = [  # in single precision, because they are yet to be scaled
            torch.empty_like(level, dtype=torch.float32)
            for level in maps[: len(ctx.dtypes)]
        ]
        total = weight.new_zeros((), dtype=torch.float32)
        for chunk in _chunks(weight, maps, columns[0]):
            pred = chunk.pred.detach().float().requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                part = _sum(loss, columns, pred, chunk)
            total += part.detach()
            if learns:
                (slope,) = torch.autograd.grad(part, pred)
                found[chunk.level].narrow(*chunk.place).copy_(slope)
        ctx.save_for_backward(*found)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slopes = [
            (slope * gradient).to(dtype)
            for slope, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, None, None, *slopes, *[None] * len(slopes)


class _Chunk(NamedTuple):
    level: int
    place: tuple[int, int, int]
    """The axis along which levels are cut, where it begins, how long it is."""
    pred: Tensor
    target: Tensor
    weight: Tensor
    """(n,), a weight for each row."""


def _chunks(
    weight: Tensor, maps: Sequence[Tensor], columns: int
) -> Iterator[_Chunk]:
    half, first = len(maps) // 2, 0
    most = ELEMENTS.get(weight.device.type, ELEMENTS['cuda'])
    for level, (pred, target) in enumerate(
        zip(maps[:half], maps[half:], strict=True)
    ):
        axis = 2 if pred.dim() == 4 else 1
        length = pred.shape[axis]
        # The rows of one image that each step along the axis has.
        rows = pred[0].numel() // (columns * length)
        step = max(1, most * length // pred.numel())
        for start in range(0, length, step):
            size = min(step, length - start)
            yield _Chunk(
                level,
                (axis, start, size),
                pred.narrow(axis, start, size),
                target.narrow(axis, start, size),
                weight.narrow(1, first + start * rows, size * rows).flatten(),
            )
        first += length * rows


def _sum(
    loss: RowLoss, columns: tuple[int, int], pred: Tensor, chunk: _Chunk
) -> Tensor:
    rows = [
        (part.permute(0, 2, 3, 1) if part.dim() == 4 else part).reshape(-1, c)
        for part, c in zip((pred, chunk.target), columns, strict=True)
    ]
    return (loss(*rows) * chunk.weight).sum()
