"""Plain forms of losses on feature maps, as their authors' codes write them.

They are what a method's speed is measured against. Each is the formula of
that code in the usual operations of PyTorch, with the options and the trained
layers of the method that it is compared with. As there, the padding of a
batch counts as image. All return the loss of a step without the method's
``loss_weight``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.losses.pkd import EPSILON

Pairs = Sequence[tuple[Tensor, Tensor]]
"""The student's adapted map and the teacher's, (B, C, H, W), by level."""


def cwd(method: Any, pairs: Pairs, batch: Batch) -> Tensor:
    """MMRazor's ``ChannelWiseDivergence``."""
    total = torch.zeros((), device=pairs[0][0].device)
    for student, teacher in pairs:
        images, channels = student.shape[:2]
        ours, theirs = (
            maps.reshape(images * channels, -1) / method.temperature
            for maps in (student, teacher)
        )
        shares = theirs.softmax(1)
        divergence = shares * theirs.log_softmax(1)
        divergence = divergence - shares * ours.log_softmax(1)
        total = total + divergence.sum() / (images * channels)
    return total * method.temperature**2


def pkd(method: Any, pairs: Pairs, batch: Batch) -> Tensor:
    """MMRazor's ``PKDLoss``, with the method's own deviation and epsilon."""
    total = torch.zeros((), device=pairs[0][0].device)
    for student, teacher in pairs:
        ours, theirs = (
            maps.transpose(0, 1).flatten(1) for maps in (student, teacher)
        )
        ours, theirs = (
            (flat - flat.mean(1, keepdim=True))
            / (flat.var(1, correction=0, keepdim=True) + EPSILON).sqrt()
            for flat in (ours, theirs)
        )
        total = total + F.mse_loss(ours, theirs) / 2
    return total


def mgd(method: Any, pairs: Pairs, batch: Batch) -> Tensor:
    """The ``FeatureLoss`` of yzd-v/MGD, with the last masks of the method."""
    total = torch.zeros((), device=pairs[0][0].device)
    stream = method.stream(int(method.draws) - 1)
    for generate, (student, teacher) in zip(
        method.generators, pairs, strict=True
    ):
        images, _, *size = student.shape
        draw = torch.rand(images, 1, *size, generator=stream)
        seen = torch.where(draw < method.mask_ratio, 0.0, 1.0)
        hidden = generate.conv1(student * seen.to(student.device)).relu()
        generated = generate.conv2(hidden)
        error = F.mse_loss(generated, teacher, reduction='sum')
        total = total + error / images
    return total


def fgd(method: Any, pairs: Pairs, batch: Batch) -> Tensor:
    """The ``FeatureLoss`` of yzd-v/FGD."""
    weights = method.weights
    total = torch.zeros((), device=pairs[0][0].device)
    for level, (student, teacher) in enumerate(pairs):
        foreground = _boxes(batch, teacher)
        background = (foreground == 0).float()
        background = background / background.sum((1, 2), keepdim=True).clamp(1)
        where_s, which_s = _attention(student, method.temperature)
        where_t, which_t = _attention(teacher, method.temperature)
        error = (student - teacher).square()
        error = error * where_t[:, None] * which_t[..., None, None]
        relation_s = _context(method.student_blocks[level], student)
        relation_t = _context(method.teacher_blocks[level], teacher)
        losses = {
            'foreground': (error * foreground[:, None]).sum(),
            'background': (error * background[:, None]).sum(),
            'attention': F.l1_loss(where_s, where_t, reduction='sum')
            + F.l1_loss(which_s, which_t, reduction='sum'),
            'relation': F.mse_loss(relation_s, relation_t, reduction='sum'),
        }
        for name, loss in losses.items():
            total = total + weights[name] * loss / len(student)
    return total


def fbkd(method: Any, pairs: Pairs, batch: Batch) -> Tensor:
    """MMRazor's ``FBKDLoss`` and its connectors.

    Cells at the edges are rounded up, as by the method.
    """
    weights = method.weights
    total = torch.zeros((), device=pairs[0][0].device)
    for layers, (student, teacher) in zip(method.layers, pairs, strict=True):
        where_s, which_s = _attention(student, method.temperature)
        where_t, which_t = _attention(teacher, method.temperature)
        mask = ((where_s + where_t) / 2).detach()[:, None]
        if method.channel_mask:
            mask = mask * ((which_s + which_t) / 2).detach()[..., None, None]
        error = (teacher - layers.feature(student)).square() * mask
        pooled_s, pooled_t = student.mean((2, 3)), teacher.mean((2, 3))
        flat_s = student.mean(1, keepdim=True)
        flat_t = teacher.mean(1, keepdim=True)
        related_s = layers.relation(_non_local(layers.student_block, student))
        related_t = _non_local(layers.teacher_block, teacher)
        losses = {
            'feature': error.sum().sqrt(),
            'channel': torch.dist(pooled_t, layers.channel(pooled_s)),
            'spatial': torch.dist(flat_t, layers.spatial(flat_s)),
            'relation': torch.dist(related_t, related_s),
        }
        for name, loss in losses.items():
            total = total + weights[name] * loss
    return total


REFERENCES: Mapping[str, Callable[[Any, Pairs, Batch], Tensor]] = {
    'CWD': cwd,
    'FBKD': fbkd,
    'FGD': fgd,
    'MGD': mgd,
    'PKD': pkd,
}
"""The plain form of each method that has one, by the method's name."""


def _attention(maps: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the attention of positions (B, H, W) and of channels (B, C)."""
    images, channels, height, width = maps.shape
    sizes = maps.abs()
    where = sizes.mean(1).flatten(1) / temperature
    where = height * width * where.softmax(1)
    which = channels * (sizes.mean((2, 3)) / temperature).softmax(1)
    return where.view(images, height, width), which


def _boxes(batch: Batch, maps: Tensor) -> Tensor:
    """Paint 1 / area of the smallest box over each position, box by box."""
    images, _, height, width = maps.shape
    painted = maps.new_zeros(images, height, width)
    for image, sample in zip(painted, batch.data_samples, strict=True):
        full_height, full_width = sample.batch_input_shape[:2]
        boxes = sample.gt_instances.bboxes.clone()
        boxes[:, 0::2] *= width / full_width
        boxes[:, 1::2] *= height / full_height
        starts, ends = boxes[:, :2].floor().int(), boxes[:, 2:].ceil().int()
        for (x1, y1), (x2, y2) in zip(starts, ends, strict=True):
            share = 1.0 / ((x2 + 1 - x1) * (y2 + 1 - y1))
            part = image[y1 : y2 + 1, x1 : x2 + 1]
            part.copy_(torch.maximum(part, share))
    return painted


def _context(block: Any, maps: Tensor) -> Tensor:
    """GcBlock: add the context of an image to each of its positions."""
    share = block.mask(maps).flatten(2).softmax(2)  # (B, 1, H * W)
    context = (maps.flatten(2) @ share.mT)[..., 0]  # (B, C)
    hidden = block.norm(block.reduce(context)).relu()
    return maps + block.expand(hidden)[..., None, None]


def _non_local(block: Any, maps: Tensor) -> Tensor:
    """A non-local block, each position with each cell."""
    phi, g = (
        F.max_pool2d(layer(maps), block.pooling, ceil_mode=True).flatten(2)
        for layer in (block.phi, block.g)
    )
    theta = block.theta(maps).flatten(2)
    pairs = theta.mT @ phi / phi.shape[2]  # (B, H * W, cells)
    related = (pairs @ g.mT).mT.unflatten(2, maps.shape[2:])
    related = F.batch_norm(
        block.out(related),
        None,
        None,
        block.scale.flatten(),
        block.shift.flatten(),
        training=True,
    )
    return maps + related
