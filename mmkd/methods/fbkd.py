"""FBKD: attention-guided and non-local distillation (ICLR 2021)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.data.batch import Batch
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError
from mmkd.losses.maps import FLAT, full_weights
from mmkd.registry import METHODS
from mmkd.teachers.view import TeacherView
from mmkd.utils import Official

from .feature_base import (
    FeatureMethod,
    channel_attention,
    image_weights,
    spatial_attention,
    sum_over_positions,
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
    https://openreview.net/forum?id=uKhGRvM8QNH. The official code is its
    supplement, which was read in copies. They differ from the paper and from
    each other:

    * For *two-stage* detectors only positions are masked, while the paper
      also masks channels. It takes all five levels, with
      ``pooling=[8, 4, 2]``.
    * MMRazor's copy, of which the AP of Faster R-CNN is known (37.4 to 39.3),
      takes P2 to P5 (``levels=[0, 1, 2, 3]``). Its block pools by 2 before it
      pools by 8, 4, 2 and 2, which makes 16, 8, 4 and 4. This is the default.
    * For *one-stage* detectors (also read in copies), the mask includes the
      channels (``channel_mask=True``), T is 0.1, and the weights are six
      times as large: 4.2e-4, 2.4e-2 and 4.2e-4; again all five levels, with
      ``pooling=[8, 4, 2]``.

    All have a quarter of the width within the blocks of the two finest levels
    and half of it in the others (``reduction=[4, 4, 2]``). Max-pooling rounds
    the number of cells down there and up here, so that nothing is dropped,
    whatever the padding.

    Args:
        temperature: T of the attention masks, above 0.
        feature_weight: :math:`w_1`, at least 0.
        attention_weight: :math:`w_2`, at least 0.
        relation_weight: :math:`w_3`, at least 0.
        channel_mask: Multiply the mask by that of the channels,
            :math:`\tfrac{1}{2} (A^{C,s} + A^{C,t})`, where the widths are
            equal.
        pooling: Sides of the non-local blocks' cells, in positions, one per
            level; the last one holds for all further levels.
        reduction: What the width is divided by within the non-local blocks,
            likewise.
        per_image: Take norms and statistics over each image.
        loss_weight: Weight of the method.
        **features: Which features are compared, and how: the other options
            of :class:`FeatureMethod`.

    Raises:
        ConfigError: If an option is outside its range or the features
            cannot be compared.
    """

    adaptable = False

    official = (
        Official(
            code='https://github.com/open-mmlab/mmrazor',
            compared='tests/methods/test_fbkd.py::TestOfficialCode',
            options=dict(
                levels=[0, 1, 2, 3],
                pooling=[16, 8, 4, 4],
                reduction=[4, 4, 2, 2],
                temperature=0.5,
                feature_weight=7e-5,
                attention_weight=4e-3,
                relation_weight=7e-5,
                channel_mask=False,
            ),
            config='fbkd_faster_rcnn_r50.py',
            ap='Faster R-CNN R101→R50, 1x: 37.4→39.3',
            differs='Padding is left out, and cells at the edges of a map '
            'count; that copy draws the first weights of its blocks with a '
            'deviation of 0.01.',
        ),
        Official(
            code='https://openreview.net/forum?id=uKhGRvM8QNH (supplement, '
            'two-stage)',
            compared='tests/methods/test_fbkd.py::TestOfficialCode',
            options=dict(pooling=[8, 4, 2]),
            differs='Padding is left out, and cells at the edges of a map '
            'count. Read in copies.',
        ),
        Official(
            code='https://openreview.net/forum?id=uKhGRvM8QNH (supplement, '
            'one-stage)',
            compared='tests/methods/test_fbkd.py::TestOfficialCode',
            options=dict(
                pooling=[8, 4, 2],
                temperature=0.1,
                feature_weight=4.2e-4,
                attention_weight=2.4e-2,
                relation_weight=4.2e-4,
                channel_mask=True,
            ),
            differs='Padding is left out, and cells at the edges of a map '
            'count. Read in copies.',
        ),
    )

    def __init__(
        self,
        *,
        temperature: float = 0.5,
        feature_weight: float = 7e-5,
        attention_weight: float = 4e-3,
        relation_weight: float = 7e-5,
        channel_mask: bool = False,
        pooling: Sequence[int] = (16, 8, 4),
        reduction: Sequence[int] = (4, 4, 2),
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
        for name, numbers, what in (
            ('pooling', pooling, 'sides'),
            ('reduction', reduction, 'divisors'),
        ):
            if (
                not isinstance(numbers, Sequence)
                or not numbers
                or any(not isinstance(n, int) or n < 1 for n in numbers)
            ):
                raise ConfigError(
                    f'FBKD.{name} must be a list of {what} of at least 1, '
                    f'got {numbers!r}'
                )
        self.temperature = temperature
        self.weights = {
            'feature': feature_weight,
            'channel': attention_weight,
            'spatial': attention_weight,
            'relation': relation_weight,
        }
        self.channel_mask = channel_mask
        self.pooling, self.reduction = tuple(pooling), tuple(reduction)
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
        self.layers = nn.ModuleList(
            LevelLayers(
                s.shape[1],
                t.shape[1],
                pooling=_of_level(self.pooling, level),
                reduction=_of_level(self.reduction, level),
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
            weights = image_weights(batch.data_samples, t)
            # Sums over a map overflow in half precision.
            with torch.autocast(t.device.type, enabled=False):
                s, t = s.float(), t.float()
                differences = layers(s, t, weights)
                mask = self._mask(s, t, weights)
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
        self, student: Tensor, teacher: Tensor, weights: Tensor | None
    ) -> Tensor:
        kinds = [spatial_attention]
        if self.channel_mask:
            kinds.append(channel_attention)
        if weights is None:
            weights = full_weights(teacher)
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
        # Row by row: in single precision, the sum of 10^7 squares is known to
        # three digits.
        rows = torch.linalg.vector_norm(differences, dim=-1)
        if self.per_image:
            rows = rows.reshape(len(rows), -1)
            return torch.linalg.vector_norm(rows, dim=1).mean()
        return torch.linalg.vector_norm(rows)


class LevelLayers(nn.Module):
    """The trained layers of one level: what is compared, and how."""

    def __init__(
        self,
        student: int,
        teacher: int,
        *,
        pooling: int,
        reduction: int,
        per_image: bool,
    ) -> None:
        super().__init__()
        self.feature = nn.Conv2d(student, teacher, 1)
        self.channel = nn.Linear(student, teacher)
        self.spatial = nn.Conv2d(1, 1, 3, padding=1)
        self.relation = nn.Conv2d(student, teacher, 1)
        self.student_block, self.teacher_block = (
            NonLocal(
                width,
                pooling=pooling,
                reduction=reduction,
                per_image=per_image,
            )
            for width in (student, teacher)
        )

    def forward(
        self, student: Tensor, teacher: Tensor, weights: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the difference to each loss's target, (B, ...).

        That of the features still counts the padding; its mask does not.
        """
        ours, theirs = (
            self._mean_over_channels(maps, weights)
            for maps in (student, teacher)
        )
        relation_s = self.student_block(student, weights)
        relation_t = self.teacher_block(teacher, weights)
        related = self.relation(relation_s) - relation_t
        spatial = self.spatial(ours) - theirs
        if weights is not None:
            related, spatial = (
                maps.where(weights > 0, 0.0) for maps in (related, spatial)
            )
        pooled_s, pooled_t = (
            _mean_over_positions(maps, weights) for maps in (student, teacher)
        )
        return {
            'feature': self.feature(student) - teacher,
            'channel': self.channel(pooled_s) - pooled_t,
            'spatial': spatial,
            'relation': related,
        }

    @staticmethod
    def _mean_over_channels(maps: Tensor, weights: Tensor | None) -> Tensor:
        """Return (B, 1, H, W), with zeros on padding, as beyond an edge."""
        mean = maps.mean(1, keepdim=True)
        return mean if weights is None else mean.where(weights > 0, 0.0)


def _mean_over_positions(maps: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean of each image's positions, (B, C)."""
    if weights is None:
        return maps.mean((2, 3))
    return sum_over_positions(maps, weights)


class NonLocal(nn.Module):
    """A non-local block of dot products with max-pooled cells.

    It starts as the identity.
    """

    def __init__(
        self, width: int, *, pooling: int, reduction: int, per_image: bool
    ) -> None:
        super().__init__()
        hidden = max(width // reduction, 1)
        self.theta = nn.Conv2d(width, hidden, 1)
        self.phi = nn.Conv2d(width, hidden, 1)
        self.g = nn.Conv2d(width, hidden, 1)
        self.out = nn.Conv2d(hidden, width, 1, bias=False)
        self.scale = nn.Parameter(torch.zeros(width, 1, 1))
        self.shift = nn.Parameter(torch.zeros(width, 1, 1))
        self.pooling, self.per_image = pooling, per_image

    def forward(self, maps: Tensor, weights: Tensor | None) -> Tensor:
        """Add related features to each position of (B, C, H, W).

        Args:
            maps: (B, C, H, W).
            weights: Weights of :func:`image_weights`.
        """
        layers = (self.theta, self.phi, self.g)
        mixed = F.conv2d(
            maps,
            torch.cat([layer.weight for layer in layers]),
            torch.cat([layer.bias for layer in layers]),  # type: ignore[misc]
        )
        theta, *others = mixed.chunk(3, dim=1)
        inside = None if weights is None else weights > 0
        phi, g = (self._pool(each, inside) for each in others)
        # phi and g are (B, hidden, cells).
        cells: Tensor | int = phi.shape[2]
        if inside is not None:
            cells = self._pool(inside.float(), inside).sum((1, 2))[
                :, None, None
            ]
        pairs = phi @ g.mT / cells  # (B, hidden, hidden)
        related = pairs.mT @ theta.flatten(2)
        if weights is None:
            weights = full_weights(maps)
        weights = weights.flatten(2).to(related.dtype)
        layer, related = self._normalising(related, weights)
        result = torch.baddbmm(maps.flatten(2), layer, related)
        return result.view_as(maps)

    def _normalising(
        self, related: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return W as one matrix, and what it is multiplied with.

        A linear layer's outputs have the variances w^T C w, with the
        covariance C of its inputs. There are fewer of these.

        Args:
            related: (B, hidden, N).
            weights: (B, 1, N), 1/n on the n positions of an image.

        Returns:
            (B, C, hidden + 1) and (B, hidden + 1, N); the last row of the
            latter, of ones, adds the shift.
        """
        if not self.per_image:
            weights = (weights > 0).to(weights.dtype)
            weights = weights / weights.sum()
        mean = related @ weights.mT  # (B, hidden, 1)
        if not self.per_image:
            mean = mean.sum(0, keepdim=True)
        centred = related - mean
        covariance = (centred * weights) @ centred.mT
        if not self.per_image:
            covariance = covariance.sum(0, keepdim=True)
        weight = self.out.weight[..., 0, 0]  # (C, hidden)
        variance = ((weight @ covariance) * weight).sum(-1, keepdim=True)
        output = weight @ mean
        scale = (variance + EPS).rsqrt()
        scale = scale.where(variance > FLAT**2 * output.square(), 0.0)
        scale, shift = scale * self.scale[..., 0], self.shift[..., 0]
        layer = torch.cat([scale * weight, shift.expand_as(scale)], dim=2)
        centred = torch.cat([centred, torch.ones_like(centred[:, :1])], dim=1)
        return layer.expand(len(related), -1, -1), centred

    def _pool(self, maps: Tensor, inside: Tensor | None) -> Tensor:
        """Return the maximum of each cell's positions, or 0 without any."""
        lowest = torch.finfo(maps.dtype).min
        if inside is not None:
            maps = maps.where(inside, lowest)
        cells = F.max_pool2d(maps, self.pooling, ceil_mode=True).flatten(2)
        return cells if inside is None else cells.where(cells > lowest, 0.0)


def _of_level(numbers: Sequence[int], level: int) -> int:
    """Return a level's number; the last one holds for all that follow."""
    return numbers[min(level, len(numbers) - 1)]
