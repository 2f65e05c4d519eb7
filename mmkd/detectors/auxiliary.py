"""Dense heads on features for which the stock detector has no head."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from mmdet.structures import DetDataSample
from torch import Size, Tensor, nn

from mmkd.data.batch import copied

from .adapters import resize_to
from .facts import DenseFacts
from .record import StepRecord


class StagePyramid(nn.Module):
    """Turns one map of a backbone into the levels that a dense head expects.

    A 1x1 convolution is followed by as many 3x3 convolutions with stride 2 as
    the coarsest level needs; levels finer than the stage are interpolated.
    Every level then has a 3x3 convolution of its own.

    Args:
        stage: A stage's map, (B, C, H, W).
        levels: The stock neck's levels for the same image, whose widths and
            sizes are used.
    """

    def __init__(self, stage: Tensor, levels: Sequence[Tensor]) -> None:
        super().__init__()
        width = levels[0].shape[1]
        self.halvings = [_halvings(stage, level) for level in levels]
        self.lateral = nn.Conv2d(stage.shape[1], width, 1)
        self.down = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride=2, padding=1)
            for _ in range(max(self.halvings))
        )
        self.out = nn.ModuleList(
            nn.Conv2d(width, level.shape[1], 3, padding=1) for level in levels
        )
        for conv in (self.lateral, *self.down, *self.out):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(
        self, stage: Tensor, sizes: Sequence[Size]
    ) -> tuple[Tensor, ...]:
        """Return levels (B, C_k, H_k, W_k) of the sizes (H_k, W_k)."""
        steps = [self.lateral(stage)]
        for conv in self.down:
            steps.append(conv(F.relu(steps[-1])))
        return tuple(
            conv(resize_to(steps[halvings], size))
            for conv, halvings, size in zip(
                self.out, self.halvings, sizes, strict=True
            )
        )


class AuxiliaryHead(nn.Module):
    """A copy of a detector's dense head, on a pyramid of one stage.

    It has freshly initialised weights of its own, and the priors, assigner
    and losses of the stock head.

    Args:
        stage: A stage's map for a blank image.
        levels: The stock neck's maps for the same image.
        facts: The facts of the stock head.
    """

    def __init__(
        self, stage: Tensor, levels: Sequence[Tensor], facts: DenseFacts
    ) -> None:
        super().__init__()
        self.pyramid = StagePyramid(stage, levels)
        self.bbox_head: Any = fresh_copy(facts)

    def loss(
        self,
        stage: Tensor,
        sizes: Sequence[Size],
        data_samples: Sequence[DetDataSample],
    ) -> tuple[Tensor, StepRecord]:
        """Return the head's stock loss, a scalar, and the head's record."""
        return head_loss(self, self.pyramid(stage, sizes), data_samples)


def head_loss(
    owner: nn.Module,
    maps: tuple[Tensor, ...],
    data_samples: Sequence[DetDataSample],
) -> tuple[Tensor, StepRecord]:
    """Return the stock loss of ``owner.bbox_head`` on maps, and outputs."""
    outputs = StepRecord(owner)
    with outputs.recording():
        own = [copied(sample) for sample in data_samples]
        losses = outputs.model.bbox_head.loss(maps, own)
    parts = [
        part.mean()
        for name, loss in losses.items()
        if 'loss' in name
        for part in (loss if isinstance(loss, list) else [loss])
    ]
    return sum(parts[1:], parts[0]), outputs


def fresh_copy(facts: DenseFacts) -> Any:
    """Return a copy of a head, initialised anew as in its config."""
    head = copy.deepcopy(facts.head)
    for module in head.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
        if hasattr(module, '_is_init'):
            module._is_init = False
    head.init_weights()
    return head


def _halvings(stage: Tensor, level: Tensor) -> int:
    """Return how often a stage's map is halved for a level, at least 0."""
    return max(round(math.log2(stage.shape[-1] / level.shape[-1])), 0)
