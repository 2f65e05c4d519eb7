"""FBKD: attention-guided and non-local distillation (ICLR 2021)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.data.batch import Batch
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError
from mmkd.losses.maps import standardize
from mmkd.registry import METHODS
from mmkd.teachers.view import TeacherView

from .feature_base import (
    FeatureMethod,
    channel_attention,
    position_weights,
    spatial_attention,
)

EPS = 1e-5
"""The epsilon of batch normalisation."""


@METHODS.register_module()
class FBKD(FeatureMethod):
    r"""Features where both networks look, attention and relations.

    The loss is the sum over the levels of

    .. math::
        L_{feat} &= w_1 \sqrt{\sum_{c,i} M_i
            (F^t_{c,i} - a(F^s)_{c,i})^2}, \qquad
        M = \tfrac{1}{2} (A^{S,s} + A^{S,t}) \\
        L_{chan} &= w_2 \, \bigl\| \textstyle\operatorname{mean}_i F^t
            - b(\operatorname{mean}_i F^s) \bigr\|_2, \qquad
        L_{spat} = w_2 \, \bigl\| \textstyle\operatorname{mean}_c F^t
            - d(\operatorname{mean}_c F^s) \bigr\|_2 \\
        L_{rel} &= w_3 \, \bigl\| R_t(F^t) - e(R_s(F^s)) \bigr\|_2

    with the spatial attention :math:`A^S` of :class:`FGD`, which gets no
    gradient here, and four adaptation layers: a and e are 1x1 convolutions,
    b is linear, d a 3x3 convolution of the one-channel map. R are non-local
    blocks, one for each network, both trained: :math:`R(F)_i = F_i + W
    \bigl(\tfrac{1}{m} \sum_j \langle \theta F_i, \phi F_j \rangle \, g F_j
    \bigr)` over the m cells j of a max-pooled map, with 1x1 convolutions and
    batch normalisation in W, which starts at 0. The product is linear, so
    :math:`\sum_j \phi F_j (g F_j)^T` is computed first and memory is linear
    in the number of positions. Padding is left out everywhere.

    The norms and batch normalisation are taken over the whole batch, as in
    the official code; ``per_image=True`` takes them over each image, and
    averages over the images.

    Source: Zhang, Ma, "Improve Object Detection with Feature-based Knowledge
    Distillation: Towards Accurate and Efficient Detectors", ICLR 2021,
    https://openreview.net/forum?id=uKhGRvM8QNH. The form, the weights and T
    are those of the official code for Faster R-CNN (the supplement, and
    MMRazor's copy), which takes P2 to P5. It differs from the paper, which
    also masks by the channels' attention (``channel_mask=True``). For
    one-stage detectors, weights six times as large are in use (UNVERIFIED).
    Max-pooling rounds the number of cells up, not down, so nothing is
    dropped, whatever the padding.

    Args:
        temperature: T of the attention masks, above 0.
        feature_weight: :math:`w_1`, at least 0.
        attention_weight: :math:`w_2`, at least 0.
        relation_weight: :math:`w_3`, at least 0.
        channel_mask: Multiply the mask by that of the channels,
            :math:`\tfrac{1}{2} (A^{C,s} + A^{C,t})`, where the widths are
            equal.
        pooling: Sides of the non-local blocks' cells, one per level; the
            last one holds for all further levels.
        per_image: Take norms and statistics over each image.
        loss_weight: Weight of the method.
        **features: Which features are compared, and how: the other options
            of :class:`FeatureMethod`.

    Raises:
        ConfigError: If an option is outside its range or the features
            cannot be compared.
    """

    adaptable = False

    def __init__(
        self,
        *,
        temperature: float = 0.5,
        feature_weight: float = 7e-5,
        attention_weight: float = 4e-3,
        relation_weight: float = 7e-5,
        channel_mask: bool = False,
        pooling: Sequence[int] = (8, 4, 2),
        per_image: bool = False,
        loss_weight: float = 1.0,
        **features: Any,
    ) -> None:
        super().__init__(loss_weight=loss_weight, **features)
        self.check_positive(temperature=temperature)
        self.check_not_negative(
            feature_weight=feature_weight,
            attention_weight=attention_weight,
            relation_weight=relation_weight,
        )
        if (
            not isinstance(pooling, Sequence)
            or not pooling
            or any(not isinstance(p, int) or p < 1 for p in pooling)
        ):
            raise ConfigError(
                'FBKD.pooling must be a list of sides of at least 1, got '
                f'{pooling!r}'
            )
        self.temperature = temperature
        self.weights = {
            'feature': feature_weight,
            'channel': attention_weight,
            'spatial': attention_weight,
            'relation': relation_weight,
        }
        self.channel_mask = channel_mask
        self.pooling = tuple(pooling)
        self.per_image = per_image
        self.layers = nn.ModuleList()

    def build_adapter(
        self, student: Tensor, teacher: Tensor, where: str
    ) -> nn.Module:
        if self.channel_mask and student.shape[1] != teacher.shape[1]:
            raise ConfigError(
                f'{where}: channel_mask=True averages the channels of both '
                f'networks, which have {student.shape[1]} and '
                f'{teacher.shape[1]}. Set it to False.'
            )
        return nn.Identity()  # each loss adapts with a layer of its own

    def build_layers(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> None:
        last = len(self.pooling) - 1
        self.layers = nn.ModuleList(
            LevelLayers(
                s.shape[1],
                t.shape[1],
                pooling=self.pooling[min(level, last)],
                per_image=self.per_image,
            )
            for level, (s, t) in enumerate(zip(student, teacher, strict=True))
        )

    def forward(
        self,
        student: StepRecord,
        teacher: TeacherView,
        batch: Batch,
    ) -> dict[str, Tensor]:
        levels = []
        for layers, (s, t) in zip(
            self.layers, self.pairs(student, teacher), strict=True
        ):
            weights = position_weights(batch.data_samples, t)
            # Sums over a map overflow in half precision.
            with torch.autocast(t.device.type, enabled=False):
                differences = layers(s.float(), t.float(), weights)
                mask = self._mask(s.float(), t.float(), weights)
                differences['feature'] = differences['feature'] * mask.sqrt()
            levels.append(
                {name: self._norm(d) for name, d in differences.items()}
            )
        return {
            name: weight * torch.stack([norms[name] for norms in levels]).sum()
            for name, weight in self.weights.items()
        }

    @torch.no_grad()
    def _mask(
        self, student: Tensor, teacher: Tensor, weights: Tensor
    ) -> Tensor:
        kinds = [spatial_attention]
        if self.channel_mask:
            kinds.append(channel_attention)
        mask = torch.ones_like(weights)
        for attention in kinds:
            ours, theirs = (
                attention(maps, weights, self.temperature)
                for maps in (student, teacher)
            )
            mask = mask * (ours + theirs) / 2
        return mask

    def _norm(self, differences: Tensor) -> Tensor:
        """Return the L2 norm of (B, ...), or the mean of the images' norms."""
        if self.per_image:
            return torch.linalg.vector_norm(
                differences.flatten(1), dim=1
            ).mean()
        return torch.linalg.vector_norm(differences)


class LevelLayers(nn.Module):
    """The trained layers of one level: what is compared, and how."""

    def __init__(
        self, student: int, teacher: int, *, pooling: int, per_image: bool
    ) -> None:
        super().__init__()
        self.feature = nn.Conv2d(student, teacher, 1)
        self.channel = nn.Linear(student, teacher)
        self.spatial = nn.Conv2d(1, 1, 3, padding=1)
        self.relation = nn.Conv2d(student, teacher, 1)
        self.student_block, self.teacher_block = (
            NonLocal(width, pooling=pooling, per_image=per_image)
            for width in (student, teacher)
        )

    def forward(
        self, student: Tensor, teacher: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """Return the difference to each loss's target, (B, ...)."""
        inside = weights > 0
        ours, theirs = (maps.where(inside, 0.0) for maps in (student, teacher))
        pooled_s, pooled_t = (
            (maps * weights).sum((2, 3)) for maps in (ours, theirs)
        )
        relation_s = self.student_block(ours, weights)
        relation_t = self.teacher_block(theirs, weights)
        differences = {
            'feature': theirs - self.feature(ours),
            'spatial': theirs.mean(1, keepdim=True)
            - self.spatial(ours.mean(1, keepdim=True)),
            'relation': relation_t - self.relation(relation_s),
        }
        return {
            'channel': pooled_t - self.channel(pooled_s),
            **{n: d.where(inside, 0.0) for n, d in differences.items()},
        }


class NonLocal(nn.Module):
    """A non-local block of dot products with max-pooled cells.

    It starts as the identity.
    """

    def __init__(self, width: int, *, pooling: int, per_image: bool) -> None:
        super().__init__()
        # As in the official code, a quarter of the width for large cells.
        hidden = max(width // (4 if pooling > 2 else 2), 1)
        self.theta = nn.Conv2d(width, hidden, 1)
        self.phi = nn.Conv2d(width, hidden, 1)
        self.g = nn.Conv2d(width, hidden, 1)
        self.out = nn.Conv2d(hidden, width, 1)
        self.scale = nn.Parameter(torch.zeros(width, 1, 1))
        self.shift = nn.Parameter(torch.zeros(width, 1, 1))
        self.pooling, self.per_image = pooling, per_image

    def forward(self, maps: Tensor, weights: Tensor) -> Tensor:
        """Add related features to each position of (B, C, H, W)."""
        inside = weights > 0
        phi, g = (
            self._pool(layer(maps), inside) for layer in (self.phi, self.g)
        )  # (B, hidden, cells)
        cells = self._pool(inside.float(), inside).sum((1, 2))  # (B,)
        pairs = phi @ g.mT / cells[:, None, None]  # (B, hidden, hidden)
        related = pairs.mT @ self.theta(maps).flatten(2)
        related = self.out(related.unflatten(2, maps.shape[2:]))
        normal, _ = standardize(
            related, weights, per_image=self.per_image, eps=EPS
        )
        return maps + normal * self.scale + self.shift

    def _pool(self, maps: Tensor, inside: Tensor) -> Tensor:
        """Return the maximum of each cell's positions, or 0 without any."""
        lowest = torch.finfo(maps.dtype).min
        cells = F.max_pool2d(
            maps.masked_fill(~inside, lowest), self.pooling, ceil_mode=True
        )
        return cells.where(cells > lowest, 0.0).flatten(2)
