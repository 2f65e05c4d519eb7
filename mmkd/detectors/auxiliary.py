"""Dense heads on features that the stock detector has no head for."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from mmdet.structures import DetDataSample
from torch import Size, Tensor, nn

from .adapters import resize_to
from .facts import DenseFacts
from .record import StepRecord


class StagePyramid(nn.Module):
    """One map of a backbone as the levels that a dense head expects.

    A 1x1 convolution, then as many 3x3 convolutions with stride 2 as the
    coarsest level asks for; levels finer than the stage are interpolated. A
    3x3 convolution of its own follows for every level.

    Args:
        stage: A stage's map, (B, C, H, W).
        levels: The stock neck's for the same image, whose widths and sizes
            are taken.
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
        """Levels (B, C_k, H_k, W_k) of the given sizes (H_k, W_k)."""
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

    It has weights of its own, freshly initialised, and the stock head's
    priors, assigner and losses.

    Args:
        stage: A stage's map for a blank image.
        levels: The stock neck's maps for the same.
        facts: About the stock head.
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
        """The head's stock loss, a scalar, and what the head has produced."""
        return head_loss(self, self.pyramid(stage, sizes), data_samples)


def head_loss(
    owner: nn.Module,
    maps: tuple[Tensor, ...],
    data_samples: Sequence[DetDataSample],
) -> tuple[Tensor, StepRecord]:
    """The stock loss of ``owner.bbox_head`` on maps, and its outputs."""
    outputs = StepRecord(owner)
    with outputs.recording():
        losses = outputs.model.bbox_head.loss(maps, list(data_samples))
    parts = [
        part.mean()
        for name, loss in losses.items()
        if 'loss' in name
        for part in (loss if isinstance(loss, list) else [loss])
    ]
    return sum(parts[1:], parts[0]), outputs


def fresh_copy(facts: DenseFacts) -> Any:
    """A copy of a head, initialised anew as its config tells."""
    copied = copy.deepcopy(facts.head)
    for module in copied.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
        if hasattr(module, '_is_init'):
            module._is_init = False
    copied.init_weights()
    return copied


def _halvings(stage: Tensor, level: Tensor) -> int:
    """How often a stage's map is halved to be a level's, at least 0."""
    return max(round(math.log2(stage.shape[-1] / level.shape[-1])), 0)
