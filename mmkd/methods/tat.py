"""TaT: the target-aware transformer (Lin et al., CVPR 2022)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.data.batch import Batch
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError
from mmkd.losses.maps import OUTSIDE, standardize
from mmkd.registry import METHODS
from mmkd.teachers.view import TeacherView
from mmkd.utils import Official

from .feature_base import FeatureMethod, position_weights

THETAS = ('identity', 'conv')
SOFTMAXES = ('student', 'teacher')
EPS = 1e-5
"""The epsilon of batch normalisation."""
NEGLIGIBLE = -40.0
"""A logit so far below the largest has the weight 4e-18. Smaller weights may
be denormal numbers, which slow a CPU down up to a hundredfold."""


@METHODS.register_module()
class TaT(FeatureMethod):
    r"""Every position of the teacher, rebuilt from all of the student's.

    .. math::
        W_{ij} = \operatorname{softmax}_j
            \langle \gamma(F^s)_j, \theta(F^t)_i \rangle, \qquad
        F'_i = \sum_j W_{ij} \, \phi(F^s)_j, \qquad
        L_{TaT} = \overline{(F' - F^t)^2}

    where :math:`\gamma` and :math:`\phi` are each a 1x1 convolution to the
    teacher's width and batch normalisation, without :math:`1/\sqrt{d}`. The
    mean is taken over each image, then over the images, then over the levels
    (the paper has one level). Comparing all positions with all others takes
    memory that is quadratic in their number, so large maps are compared in a
    hierarchy of two levels,

    .. math::
        L = \delta L_{patch} + \zeta L_{anchor}

    * Patch groups: the map is cut into patches; ``patches_per_group``
      neighbours of a row are joined along the channels, and TaT runs between
      the positions within a patch, once per group.
    * Anchor points: each image is average-pooled to ``anchor_grid`` cells
      (of whole positions: their sizes differ by at most one), and TaT runs
      once, between the cells.

    Memory is linear in the number of positions, because patches have a fixed
    size and the grid has a fixed number of cells. Maps of any size are padded
    to whole groups. This padding and that of the batch are masked: they
    attend to nothing, nothing attends to them, and their errors don't count.
    Batch normalisation leaves padding out as well. It is not used after
    training, so it keeps no running statistics.

    Source: Lin, Xie, Wang, Yu, Chang, Liang, Wang, "Knowledge Distillation via
    the Target-aware Transformer", CVPR 2022, https://arxiv.org/abs/2205.10793,
    sec. 3. Its authors tested classification and segmentation, never
    detection. Their code for segmentation (sihaoevery/TaT-seg) goes through a
    batch image by image, so that each image has the statistics of its own
    (``per_image``, the default). It differs from the text: it takes the
    softmax over the *teacher's* positions, in rows of the student's
    (``softmax='teacher'``), and its :math:`\theta` is a convolution with batch
    normalisation (``theta='conv'``), while the paper finds the identity best.
    It cuts each map into a fixed *number* of patches, joins two of them in
    the end (``patches_per_group=2``), and drops the rows that remain. Their
    code for classification (sihaoevery/TaT) normalises over the batch. The
    weights are those of its ResNet-18 on COCO-Stuff; patch size and grid for
    detectors are UNVERIFIED.

    Args:
        patch_size: Rows and columns of a patch, in positions; None for no
            patch groups.
        patches_per_group: How many patches are joined.
        anchor_grid: Rows and columns of cells; None for no anchor points.
            With neither of them, TaT has its plain quadratic form, with
            weight 1.
        patch_weight: :math:`\delta`, at least 0.
        anchor_weight: :math:`\zeta`, at least 0.
        theta: ``'identity'`` or ``'conv'``.
        softmax: The positions that it runs over: ``'student'`` or
            ``'teacher'``.
        per_image: Normalise with the statistics of each image, or else with
            those of the batch.
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
            code='https://github.com/sihaoevery/TaT-seg',
            compared='tests/methods/test_tat.py::TestOfficialCode',
            options=dict(
                theta='conv',
                softmax='teacher',
                per_image=True,
                patches_per_group=2,
                patch_weight=0.6,
                anchor_weight=0.6,
            ),
            differs='It is for segmentation. It cuts a map into a fixed '
            'number of patches (32x32) and cells, and drops the rows that '
            'remain; here patches have a fixed size and nothing is dropped.',
        ),
    )

    def __init__(
        self,
        *,
        patch_size: Sequence[int] | None = (8, 8),
        patches_per_group: int = 4,
        anchor_grid: Sequence[int] | None = (16, 16),
        patch_weight: float = 0.6,
        anchor_weight: float = 0.6,
        theta: str = 'identity',
        softmax: str = 'student',
        per_image: bool = True,
        loss_weight: float = 1.0,
        **features: Any,
    ) -> None:
        super().__init__(loss_weight=loss_weight, **features)
        self.patch_size = _pair('patch_size', patch_size)
        self.anchor_grid = _pair('anchor_grid', anchor_grid)
        if not _counts(patches_per_group):
            raise ConfigError(
                'TaT.patches_per_group must be a whole number of at least 1, '
                f'got {patches_per_group!r}'
            )
        self.check_not_negative(
            patch_weight=patch_weight, anchor_weight=anchor_weight
        )
        self.check_choice(THETAS, theta=theta)
        self.check_choice(SOFTMAXES, softmax=softmax)
        self.patches_per_group = patches_per_group
        self.patch_weight, self.anchor_weight = patch_weight, anchor_weight
        self.theta, self.softmax = theta, softmax
        self.per_image = per_image
        self.embeddings = nn.ModuleList()

    def build_adapter(
        self, student: Tensor, teacher: Tensor, where: str
    ) -> nn.Module:
        return nn.Identity()  # gamma and phi adapt the width

    def build_layers(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> None:
        self.embeddings = nn.ModuleList(
            Embeddings(
                s.shape[1],
                t.shape[1],
                theta=self.theta,
                per_image=self.per_image,
            )
            for s, t in zip(student, teacher, strict=True)
        )

    def forward(
        self,
        student: StepRecord,
        teacher: TeacherView,
        batch: Batch,
    ) -> dict[str, Tensor]:
        levels = []
        for embed, (s, t) in zip(
            self.embeddings, self.pairs(student, teacher), strict=True
        ):
            weights = position_weights(batch.data_samples, t)
            # Dot products of many channels overflow in half precision.
            with torch.autocast(t.device.type, enabled=False):
                maps = embed(s.float(), t.float(), weights)
                levels.append(self._level_losses(maps, weights))
        return {
            name: torch.stack([losses[name] for losses in levels]).mean()
            for name in levels[0]
        }

    def _level_losses(
        self, maps: Sequence[Tensor], weights: Tensor
    ) -> dict[str, Tensor]:
        """Return TaT of keys, values, queries and targets (B, C, H, W)."""
        losses = {}
        if self.patch_size:
            groups = [
                group_patches(m, self.patch_size, self.patches_per_group)
                for m in (*maps, weights)
            ]
            losses['patch'] = self.patch_weight * self._error(*groups)
        if self.anchor_grid:
            cells = pool_cells(maps, weights, self.anchor_grid)
            losses['anchor'] = self.anchor_weight * self._error(*cells)
        if not losses:
            whole = [m.flatten(2).mT for m in (*maps, weights)]
            losses['tat'] = self._error(*whole)
        images = max(len(weights), 1)
        return {name: loss / images for name, loss in losses.items()}

    def _error(
        self,
        keys: Tensor,
        values: Tensor,
        queries: Tensor,
        targets: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Return the weighted error of the rebuilt targets.

        Args:
            keys: gamma(F_s) of G groups, (G, N, p * C).
            values: phi(F_s), of the same shape.
            queries: theta(F_t), of the same shape.
            targets: F_t, of the same shape.
            weights: (G, N, p), 0 on padding; their sum is the number of
                images.
        """
        rows, columns = queries, keys
        if self.softmax == 'teacher':
            rows, columns = keys, queries
        padding = (weights == 0).all(-1)[:, None]  # (G, 1, N)
        logits = (rows @ columns.mT).masked_fill(padding, OUTSIDE)
        logits = logits - logits.detach().amax(-1, keepdim=True)
        logits = logits.clamp(min=NEGLIGIBLE).masked_fill(padding, OUTSIDE)
        rebuilt = logits.softmax(-1) @ values
        errors = F.mse_loss(rebuilt, targets, reduction='none')
        errors = errors.unflatten(-1, (weights.shape[-1], -1)).mean(-1)
        return (errors * weights).sum()


class Embeddings(nn.Module):
    """Embeds the student's map (gamma, phi) and the teacher's (theta)."""

    def __init__(
        self, student: int, teacher: int, *, theta: str, per_image: bool
    ) -> None:
        super().__init__()
        self.gamma = Embedding(student, teacher, per_image=per_image)
        self.phi = Embedding(student, teacher, per_image=per_image)
        self.theta = None
        if theta == 'conv':
            self.theta = Embedding(teacher, teacher, per_image=per_image)

    def forward(
        self, student: Tensor, teacher: Tensor, weights: Tensor
    ) -> list[Tensor]:
        """Return keys, values, queries and targets, all 0 on padding."""
        queries = teacher
        if self.theta is not None:
            queries = self.theta(teacher, weights)
        keys = self.gamma(student, weights)
        values = self.phi(student, weights)
        padding = weights == 0
        return [
            maps.masked_fill(padding, 0.0)
            for maps in (keys, values, queries, teacher)
        ]


class Embedding(nn.Module):
    """A 1x1 convolution and batch normalisation without the padding."""

    def __init__(self, width: int, out: int, *, per_image: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, 1, bias=False)
        self.scale = nn.Parameter(torch.ones(out, 1, 1))
        self.shift = nn.Parameter(torch.zeros(out, 1, 1))
        self.per_image = per_image

    def forward(self, maps: Tensor, weights: Tensor) -> Tensor:
        normal, _ = standardize(
            self.conv(maps), weights, per_image=self.per_image, eps=EPS
        )
        return normal * self.scale + self.shift


def group_patches(maps: Tensor, size: tuple[int, int], group: int) -> Tensor:
    """Cut maps into patches and join those of a group along the channels.

    Args:
        maps: (B, C, H, W); zeros are added up to whole groups.
        size: Rows h and columns w of a patch.
        group: Patches p of a group, neighbours of one row, so that what is
            grouped does not depend on the padding.

    Returns:
        (B * groups, h * w, p * C).
    """
    (rows, columns), (height, width) = size, maps.shape[-2:]
    right, below = -width % (columns * group), -height % rows
    maps = F.pad(maps, (0, right, 0, below))
    maps = maps.unflatten(3, (-1, group, columns)).unflatten(2, (-1, rows))
    # image, channel, group's row, row, group's column, patch, column
    maps = maps.permute(0, 2, 4, 3, 6, 5, 1)
    return maps.flatten(5).flatten(3, 4).flatten(0, 2)


def pool_cells(
    maps: Sequence[Tensor], weights: Tensor, grid: tuple[int, int]
) -> list[Tensor]:
    """Average each image, without its padding, to a grid of cells.

    Args:
        maps: Maps, each (B, C, H, W).
        weights: (B, 1, H, W), 0 on padding, which lies right and below.
        grid: Rows and columns of cells. An image of fewer positions leaves
            some empty.

    Returns:
        Each map as (B, cells, C), and last the cells' weights (B, cells, 1):
        0 for empty ones, 1 in sum for each image.
    """
    inside = weights[:, 0] > 0
    down = _cell_shares(inside.any(2), grid[0])  # (B, rows, H)
    across = _cell_shares(inside.any(1), grid[1])  # (B, columns, W)
    pooled = [
        torch.einsum('brh,bchw,bkw->brkc', down, m, across).flatten(1, 2)
        for m in maps
    ]
    filled = down.sum(2)[:, :, None] * across.sum(2)[:, None]  # 1 or 0
    filled = filled.flatten(1).round()
    return [*pooled, (filled / filled.sum(1, keepdim=True))[..., None]]


def _cell_shares(inside: Tensor, cells: int) -> Tensor:
    """Return each position's share in each cell's average along an axis.

    Args:
        inside: (B, L), True on the first positions of each image.
        cells: Number of cells.

    Returns:
        (B, cells, L).
    """
    device = inside.device
    position = torch.arange(inside.shape[1], device=device)
    length = inside.sum(1, keepdim=True).clamp(min=1)
    cell = position * cells // length  # (B, L)
    index = torch.arange(cells, device=device)[:, None]
    member = ((cell[:, None] == index) & inside[:, None]).float()
    return member / member.sum(2, keepdim=True).clamp(min=1)


def _counts(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def _pair(option: str, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if (
        not isinstance(value, Sequence)
        or len(value) != 2
        or not all(_counts(number) for number in value)
    ):
        raise ConfigError(
            f'TaT.{option} must be (rows, columns) of at least 1, or None, '
            f'got {value!r}'
        )
    return value[0], value[1]
