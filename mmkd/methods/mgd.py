"""MGD: masked generative distillation (Yang et al., ECCV 2022)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from torch import Tensor, nn

from mmkd.data.batch import Batch
from mmkd.detectors.record import StepRecord
from mmkd.registry import METHODS
from mmkd.teachers.view import TeacherView

from .feature_base import FeatureMethod, position_weights


@METHODS.register_module()
class MGD(FeatureMethod):
    r"""The teacher's feature, generated from a masked student's.

    .. math::
        L = \sum_l \frac{1}{B} \sum_{b, c, i}
            \bigl(F^t - G_l(M \cdot \mathrm{adapt}_l(F^s))\bigr)^2, \qquad
        G = \mathrm{conv}_{3 \times 3} \circ \mathrm{ReLU}
            \circ \mathrm{conv}_{3 \times 3}

    with a mask M of one random value per position: 0 with the probability
    ``mask_ratio``, else 1. Padding counts as masked, and its errors do not
    count. The errors are summed, not averaged, because the published weights
    are for sums; the loss of a larger image is larger.

    The masks come from a stream of their own. Mask n of a process is drawn
    from a generator that is seeded with the run's seed, n and the rank of the
    process, and n is saved with the adapters. No global random state is
    touched, so the student's samplers draw the same numbers as without MGD,
    and a resumed run draws the masks of the uninterrupted one.

    Source: Yang, Li, Shao, Shi, Yuan, Yuan, "Masked Generative Distillation",
    ECCV 2022, https://arxiv.org/abs/2205.01529; weight 2e-5 and mask ratio .65
    for one-stage, 5e-7 and .45 for two-stage detectors. The official code
    (yzd-v/MGD) adapts only where the widths differ, as here.

    Args:
        mask_ratio: Share of the masked positions, from 0, below 1.
        loss_weight: Weight of the method.
        **features: Which features are compared, and how: the other options
            of :class:`FeatureMethod`.

    Raises:
        ConfigError: If an option is outside its range or the features
            cannot be compared.
    """

    draws: Tensor

    def __init__(
        self,
        *,
        mask_ratio: float = 0.65,
        loss_weight: float = 2e-5,
        **features: Any,
    ) -> None:
        super().__init__(loss_weight=loss_weight, **features)
        self.check_option(
            0 <= mask_ratio < 1, 'mask_ratio', mask_ratio, 'from 0 to below 1'
        )
        self.mask_ratio = mask_ratio
        self.generators = nn.ModuleList()
        self.seed = torch.initial_seed()
        self.register_buffer('draws', torch.zeros((), dtype=torch.long))
        self._draws: int | None = None
        """``draws`` on the host, as reading it from a GPU would wait."""

    def build_layers(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> None:
        self.generators = nn.ModuleList(Generator(t.shape[1]) for t in teacher)

    def forward(
        self,
        student: StepRecord,
        teacher: TeacherView,
        batch: Batch,
    ) -> dict[str, Tensor]:
        stream = self.next_stream()
        losses = []
        for generate, (s, t) in zip(
            self.generators, self.pairs(student, teacher), strict=True
        ):
            inside = position_weights(batch.data_samples, t) > 0
            seen = inside & draw_mask(inside, self.mask_ratio, stream)
            generated = generate(s.where(seen, 0.0), inside)
            losses.append(squared_error(generated, t, inside))
        return {'mgd': torch.stack(losses).sum()}

    def next_stream(self) -> torch.Generator:
        """Return the random numbers of this process's next step."""
        if self._draws is None:
            self._draws = int(self.draws)
        entropy = (self.seed, self._draws, get_rank())
        seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        self._draws += 1
        self.draws += 1
        return torch.Generator().manual_seed(int(seed[0]))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._draws = None


class Generator(nn.Module):
    """Two 3x3 convolutions that treat padding like the edge of a map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, maps: Tensor, inside: Tensor) -> Tensor:
        hidden = self.conv1(maps).relu().where(inside, 0.0)
        return self.conv2(hidden)


def draw_mask(
    inside: Tensor, mask_ratio: float, stream: torch.Generator
) -> Tensor:
    """Draw which positions stay, with the probability 1 - ``mask_ratio``.

    The mask is drawn on the CPU, so that all devices see the same masks.

    Args:
        inside: (B, 1, H, W), of the shape and device of the mask.
        mask_ratio: Probability of a masked position.
        stream: The random numbers.
    """
    stays = torch.rand(inside.shape, generator=stream) >= mask_ratio
    return stays.to(inside.device, non_blocking=True)


def squared_error(generated: Tensor, target: Tensor, inside: Tensor) -> Tensor:
    """Return the squared error summed over an image, averaged over images."""
    error = generated.float() - target.float()
    return error.where(inside, 0.0).square().sum() / max(len(target), 1)
