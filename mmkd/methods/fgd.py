"""FGD: focal and global distillation (Yang et al., CVPR 2022)."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from mmdet.structures import DetDataSample
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmkd.data.batch import Batch
from mmkd.detectors.record import StepRecord, as_tensor
from mmkd.losses.maps import OUTSIDE
from mmkd.registry import METHODS
from mmkd.teachers.view import TeacherView
from mmkd.utils import Official

from .feature_base import (
    FeatureMethod,
    both_attentions,
    position_weights,
    sum_over_positions,
)

AT_ONCE = 32
"""How many boxes of an image are painted at once, with a mask each."""


@METHODS.register_module()
class FGD(FeatureMethod):
    r"""Features by the teacher's attention, in objects and in background.

    The attention of a feature map, over the n positions of its image and over
    its C channels, is

    .. math::
        A^S_i = n \, \mathrm{softmax}_i
            \Bigl(\tfrac{1}{C} \textstyle\sum_c |F_{c,i}| / T\Bigr), \qquad
        A^C_c = C \, \mathrm{softmax}_c
            \Bigl(\tfrac{1}{n} \textstyle\sum_i |F_{c,i}| / T\Bigr)

    and the losses, averaged over the images and summed over the levels, with
    the adapted :math:`F^s`, are

    .. math::
        L_{fg} &= \alpha \sum_{c,i} M^{fg}_i A^{S,t}_i A^{C,t}_c
            (F^t_{c,i} - F^s_{c,i})^2, \qquad
        L_{bg} = \beta \sum_{c,i} M^{bg}_i A^{S,t}_i A^{C,t}_c
            (F^t_{c,i} - F^s_{c,i})^2 \\
        L_{at} &= \gamma \Bigl(\sum_i |A^{S,t}_i - A^{S,s}_i|
            + \sum_c |A^{C,t}_c - A^{C,s}_c|\Bigr), \qquad
        L_{rel} = \lambda \sum_{c,i} (R_t(F^t) - R_s(F^s))_{c,i}^2

    :math:`M^{fg}_i` is 1 / area of the smallest ground-truth box (xyxy,
    pixels) over position i, counted in positions of the level from the floor
    of its upper left to the ceiling of its lower right corner, both included,
    or 0. :math:`M^{bg}_i` is 1 / their number on all other positions. R are
    two GcBlocks, which are trained (including the teacher's),
    :math:`R(F) = F + W_2
    \mathrm{ReLU}(\mathrm{LN}(W_1 \sum_j \mathrm{softmax}_j(W_k F_j) F_j))`.
    Positions on padding are left out everywhere.

    Source: Yang, Li, Jiang, Gong, Yuan, Zhao, Yuan, "Focal and Global
    Knowledge Distillation for Detectors", CVPR 2022,
    https://arxiv.org/abs/2111.11837, and its code (yzd-v/FGD), whose RetinaNet
    weights are the defaults; its Faster R-CNN has 5e-5, 2.5e-5, 5e-5 and 5e-7,
    its FCOS 1.6e-3, 8e-4, 8e-4, 8e-6 and T = 0.8. That code scales boxes by
    the size of the unpadded image, which shifts them on padded images, and
    counts padding as background; mmkd does neither. Its recipe also starts
    the student's neck and head from the teacher's, and clips gradients at 35.

    Args:
        temperature: T of the attention, above 0.
        foreground_weight: :math:`\alpha`, at least 0.
        background_weight: :math:`\beta`, at least 0.
        attention_weight: :math:`\gamma`, at least 0.
        relation_weight: :math:`\lambda`, at least 0.
        loss_weight: Weight of the method.
        **features: Which features are compared, and how: the other options
            of :class:`FeatureMethod`.

    Raises:
        ConfigError: If an option is outside its range or the features
            cannot be compared.
    """

    needs_labels = True

    official = (
        Official(
            code='https://github.com/yzd-v/FGD',
            compared='tests/methods/test_fgd.py::TestOfficialCode',
            options=dict(
                temperature=0.5,
                foreground_weight=1e-3,
                background_weight=5e-4,
                attention_weight=5e-4,
                relation_weight=5e-6,
            ),
            config='fgd_retinanet_r50.py',
            ap='RetinaNet X101→R50, 2x: 37.4→40.7',
            differs='Boxes are placed by the size of the padded batch, and '
            "padding is no background; the student's neck and head do not "
            "start from the teacher's.",
        ),
    )

    def __init__(
        self,
        *,
        temperature: float = 0.5,
        foreground_weight: float = 1e-3,
        background_weight: float = 5e-4,
        attention_weight: float = 5e-4,
        relation_weight: float = 5e-6,
        loss_weight: float = 1.0,
        **features: Any,
    ) -> None:
        super().__init__(loss_weight=loss_weight, **features)
        self.check_positive(temperature=temperature)
        self.temperature = temperature
        self.weights = {
            'foreground': foreground_weight,
            'background': background_weight,
            'attention': attention_weight,
            'relation': relation_weight,
        }
        self.check_not_negative(
            **{f'{name}_weight': w for name, w in self.weights.items()}
        )
        self.student_blocks = nn.ModuleList()
        self.teacher_blocks = nn.ModuleList()

    def build_layers(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> None:
        widths = [t.shape[1] for t in teacher]
        self.student_blocks = nn.ModuleList(map(ContextBlock, widths))
        self.teacher_blocks = nn.ModuleList(map(ContextBlock, widths))

    def forward(
        self,
        student: StepRecord,
        teacher: TeacherView,
        batch: Batch,
    ) -> dict[str, Tensor]:
        boxes = relative_boxes(batch.data_samples)
        levels = []
        for level, (s, t) in enumerate(self.pairs(student, teacher)):
            weights = position_weights(batch.data_samples, t)
            # Sums over a map overflow in half precision.
            with torch.autocast(t.device.type, enabled=False):
                s, t = s.float(), t.float()
                levels.append(self._level(level, s, t, weights, boxes))
        return {
            name: weight
            / len(boxes)
            * torch.stack([losses[name] for losses in levels]).sum()
            for name, weight in self.weights.items()
        }

    def _level(
        self,
        level: int,
        student: Tensor,
        teacher: Tensor,
        weights: Tensor,
        boxes: Tensor,
    ) -> dict[str, Tensor]:
        """Return a level's unweighted losses, summed over the batch."""
        (where_s, which_s), (where_t, which_t) = (
            both_attentions(maps, weights, self.temperature)
            for maps in (student, teacher)
        )
        inside = (weights > 0).float()
        foreground = paint_boxes(boxes, teacher.shape[-2:]) * inside
        background = inside * (foreground == 0)
        count = background.sum((2, 3), keepdim=True).clamp(min=1)
        difference = student - teacher
        squares = difference.square()
        # (B, 1, C) times (B, C, H W)
        errors = which_t[..., 0].mT @ squares.flatten(2)
        errors = errors.view_as(where_t) * where_t
        # R adds a context c to every position, so its squared errors are
        # (d + c)^2 = d^2 + c (2 d + c), summed over the positions.
        contexts = [
            cast(ContextBlock, blocks[level]).context(maps, inside)
            for blocks, maps in (
                (self.student_blocks, student),
                (self.teacher_blocks, teacher),
            )
        ]
        context = contexts[0] - contexts[1]
        sums = 2 * sum_over_positions(difference, inside)
        sums = sums + context * inside.sum((2, 3))
        relation = sum_over_positions(squares, inside) + context * sums
        return {
            'foreground': (errors * foreground).sum(),
            'background': (errors * background / count).sum(),
            'attention': (where_t - where_s).abs().sum()
            + (which_t - which_s).abs().sum(),
            'relation': relation.sum(),
        }


class ContextBlock(nn.Module):
    """GcBlock (Cao et al., 2019): adds an image's context to each position.

    It starts as the identity.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = max(width // 2, 1)
        self.mask = nn.Conv2d(width, 1, 1)
        self.reduce = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.expand = nn.Linear(hidden, width)
        nn.init.kaiming_normal_(self.mask.weight, nonlinearity='relu')
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, maps: Tensor, inside: Tensor) -> Tensor:
        return maps + self.context(maps, inside)[..., None, None]

    def context(self, maps: Tensor, inside: Tensor) -> Tensor:
        """Return what is added to each position of an image, (B, C).

        Args:
            maps: (B, C, H, W).
            inside: (B, 1, H, W), 0 on padding.
        """
        logits = self.mask(maps).masked_fill(inside == 0, OUTSIDE)
        share = logits.flatten(2).softmax(-1)  # (B, 1, H * W)
        context = (maps.flatten(2) @ share.mT)[..., 0]  # (B, C)
        return self.expand(self.norm(self.reduce(context)).relu())


def relative_boxes(data_samples: Sequence[DetDataSample]) -> Tensor:
    """Return the boxes as shares of the padded batch's width and height.

    Returns:
        (B, N, 4) as xyxy; images of fewer boxes are filled up with NaN.
    """
    sample = data_samples[0]
    shape = sample.metainfo.get('batch_input_shape', sample.img_shape)
    height, width = shape[:2]
    boxes = pad_sequence(
        [as_tensor(s.gt_instances.bboxes).float() for s in data_samples],
        batch_first=True,
        padding_value=float('nan'),
    )
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack(
        [x1 / width, y1 / height, x2 / width, y2 / height], dim=-1
    )


def paint_boxes(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Paint 1 / area of the smallest box over each position, or 0.

    Args:
        boxes: Boxes of :func:`relative_boxes`, (B, N, 4).
        size: H and W of the result.

    Returns:
        (B, 1, H, W).
    """
    painted = boxes.new_zeros(len(boxes), 1, *size)
    for start in range(0, boxes.shape[1], AT_ONCE):
        some = boxes[:, start : start + AT_ONCE]
        painted = torch.maximum(painted, _paint(some, size))
    return painted


def _paint(boxes: Tensor, size: Sequence[int]) -> Tensor:
    height, width = size
    left, right = (
        (boxes[..., 0] * width).floor(),
        (boxes[..., 2] * width).ceil(),
    )
    top, below = (
        (boxes[..., 1] * height).floor(),
        (boxes[..., 3] * height).ceil(),
    )
    share = 1 / ((right - left + 1) * (below - top + 1))
    x = torch.arange(width, device=boxes.device)
    y = torch.arange(height, device=boxes.device)
    # A NaN is neither above nor below, so it covers nothing.
    across = (x >= left[..., None]) & (x <= right[..., None])  # (B, N, W)
    down = (y >= top[..., None]) & (y <= below[..., None])  # (B, N, H)
    covered = down[..., None] & across[:, :, None]
    each = share[..., None, None].where(covered, 0.0)  # (B, N, H, W)
    return each.amax(1, keepdim=True)
