"""MGD: masked generative distillation (Yang et al., ECCV 2022)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.dist import get_rank
from torch import Tensor, nn

from mmkd.data.batch import Batch
from mmkd.detectors.record import StepRecord
from mmkd.registry import METHODS
from mmkd.teachers.view import TeacherView
from mmkd.utils import Official

from .feature_base import FeatureMethod, image_weights


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
    (yzd-v/MGD) adapts only where the widths differ, as here; it draws the
    masks from the global generator and generates padding too. Its recipe also
    starts the student's neck and head from the teacher's, and clips gradients
    at 35.

    Args:
        mask_ratio: Share of the masked positions, from 0, below 1.
        loss_weight: Weight of the method.
        **features: Which features are compared, and how: the other options
            of :class:`FeatureMethod`.

    Raises:
        ConfigError: If an option is outside its range or the features
            cannot be compared.
    """

    official = (
        Official(
            code='https://github.com/yzd-v/MGD',
            compared='tests/methods/test_mgd.py::TestOfficialCode',
            options=dict(mask_ratio=0.65, loss_weight=2e-5),
            config='mgd_retinanet_r50.py',
            ap='RetinaNet X101→R50, 2x: 37.4→41.0',
            differs='The masks come from a stream of their own, and padding '
            "is left out; the student's neck and head do not start from the "
            "teacher's.",
        ),
    )

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
            weights = image_weights(batch.data_samples, t)
            inside = None if weights is None else weights > 0
            seen = draw_mask(t[:, :1], self.mask_ratio, stream)
            if inside is not None:
                seen = seen & inside
            generated = generate(s * seen.to(s.dtype), inside)
            losses.append(squared_error(generated, t, inside))
        return {'mgd': torch.stack(losses).sum()}

    def next_stream(self) -> torch.Generator:
        """Return the random numbers of this process's next step."""
        if self._draws is None:
            self._draws = int(self.draws)
        stream = self.stream(self._draws)
        self._draws += 1
        self.draws += 1
        return stream

    def stream(self, draw: int) -> torch.Generator:
        """Return the random numbers of a step of this process, from 0."""
        entropy = (self.seed, draw, get_rank())
        seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
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

    def forward(self, maps: Tensor, inside: Tensor | None) -> Tensor:
        hidden = self.conv1(maps)
        if inside is not None:
            hidden = hidden.mul_(inside.to(hidden.dtype))
        return self.conv2(hidden.relu_())


def draw_mask(
    like: Tensor, mask_ratio: float, stream: torch.Generator
) -> Tensor:
    """Draw which positions stay, with the probability 1 - ``mask_ratio``.

    The mask is drawn on the CPU, so that all devices see the same masks.

    Args:
        like: (B, 1, H, W), of the shape and device of the mask.
        mask_ratio: Probability of a masked position.
        stream: The random numbers.
    """
    stays = torch.rand(like.shape, generator=stream) >= mask_ratio
    return stays.to(like.device, non_blocking=True)


def squared_error(
    generated: Tensor, target: Tensor, inside: Tensor | None
) -> Tensor:
    """Return the squared error summed over an image, averaged over images."""
    generated, target = generated.float(), target.float()
    if inside is not None:
        generated = generated.where(inside, target)
    error = F.mse_loss(generated, target, reduction='sum')
    return error / max(len(target), 1)
