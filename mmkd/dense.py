"""What dense heads have in common, read by structure.

A dense head predicts classes and a box at every prior (an anchor or a point)
of every level. Heads differ in what they are called and in what else they
predict; here they are told apart by what they return.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from mmdet.structures import DetDataSample
from mmdet.utils import reduce_mean
from torch import Tensor

from .outputs import Outputs, flatten_levels
from .utils import ConfigError

if TYPE_CHECKING:
    from .teacher import TeacherOutputs

PROBABILITY_FLOOR = 1e-6
"""Of heads that return probabilities: where their logit is cut off."""


@dataclass
class DenseOutputs:
    """A dense head's predictions for the N priors of each of B images.

    Priors are in MMDetection's order: level, row, column, prior of a point.
    """

    head: Any
    logits: Tensor
    """(B, N, K) of a sigmoid head; (B, N, K + 1) of a softmax head, whose
    last column is the background."""
    sigmoid: bool
    """Whether the classes are independent binary problems."""
    regression: Tensor | None
    """(B, N, R) as the head returns it: R = 4 deltas or distances, or the
    logits of 4 (n + 1) bins; None where the boxes are not a vector a
    prior."""
    quality: Tensor | None
    """(B, N) logits of centerness, IoU or objectness, if there is such."""
    sizes: list[tuple[int, int]]
    """(H, W) of each level."""

    @property
    def bins(self) -> Tensor | None:
        """(B, N, 4, n + 1) logits of the distances' distributions (DFL)."""
        count = getattr(self.head, 'reg_max', None)
        if self.regression is None or count is None:
            return None
        if self.regression.shape[-1] != 4 * (count + 1):
            return None
        return self.regression.unflatten(-1, (4, count + 1))

    @functools.cached_property
    def priors(self) -> Tensor:
        """(N, 4) anchors as xyxy, or (N, 2) points as xy, in pixels."""
        levels = self.head.prior_generator.grid_priors(
            self.sizes, device=self.logits.device
        )
        return torch.cat(list(levels))

    @functools.cached_property
    def centres(self) -> Tensor:
        """(N, 2) the priors' centres, xy in pixels."""
        if hasattr(self.head.prior_generator, 'base_anchors'):
            return (self.priors[:, :2] + self.priors[:, 2:]) / 2
        return self.priors[:, :2]

    def inside(self, data_samples: Sequence[DetDataSample]) -> Tensor:
        """(B, N) which priors have their centre in the image, not padding."""
        shapes = torch.tensor(
            [sample.img_shape[1::-1] for sample in data_samples],
            dtype=self.centres.dtype,
        ).to(self.centres.device, non_blocking=True)
        return (self.centres < shapes[:, None]).all(-1)


@dataclass
class DenseTargets:
    """What the student's own assignment made of its priors."""

    labels: Tensor
    """(B, N); 0..K-1 are objects, all else is background or ignored."""
    weights: Tensor
    """(B, N) weights of the classification, 0 for ignored and padding."""
    classes: int

    @functools.cached_property
    def positive(self) -> Tensor:
        """(B, N) which priors are assigned to an object."""
        return (self.labels >= 0) & (self.labels < self.classes)

    @functools.cached_property
    def index(self) -> tuple[Tensor, Tensor]:
        """Image and prior of each of the P positives, (P,) each."""
        image, prior = self.positive.nonzero(as_tuple=True)
        return image, prior

    @functools.cached_property
    def number(self) -> Tensor:
        """The number of positives, averaged over processes, at least 1."""
        count = self.positive.sum().to(torch.float32)
        return reduce_mean(count).clamp(min=1)


def student_dense(student: Outputs) -> DenseOutputs:
    """The student's dense predictions in this step."""
    if 'dense' not in student.cache:
        raw = student.raw('bbox_head')
        student.cache['dense'] = read_dense(student.model.bbox_head, raw)
    return student.cache['dense']


def teacher_dense(teacher: 'TeacherOutputs') -> DenseOutputs:
    """The teacher's dense predictions for the same batch."""
    if 'dense' not in teacher.cache:
        head = teacher.model.bbox_head
        teacher.cache['dense'] = read_dense(head, teacher.dense)
    return teacher.cache['dense']


def student_targets(
    student: Outputs, data_samples: Sequence[DetDataSample]
) -> DenseTargets:
    """What the student's own loss has assigned in this step.

    Priors in the padding get weight 0.

    Raises:
        TapError: If the head has assigned nothing in a known way.
        ConfigError: If what it returned holds no label a prior.
    """
    if 'targets' not in student.cache:
        dense = student_dense(student)
        labels, weights = _labels_and_weights(dense, student.dense_targets)
        weights = weights.float() * dense.inside(data_samples)
        classes = dense.head.num_classes
        targets = DenseTargets(labels, weights, classes)
        student.cache['targets'] = targets
    return student.cache['targets']


def read_dense(head: Any, raw: Any) -> DenseOutputs:
    """Sort out what a dense head returned.

    Args:
        head: The head.
        raw: Its output: a tuple of lists of maps (B, A * c, H, W), a map a
            level; the first is the classes', and a third of one channel a
            prior is a quality or objectness. In YOLOv3 all are one map.

    Raises:
        ConfigError: If the head returned anything else.
    """
    _check_structure(head, raw)
    sizes = [tuple(level.shape[-2:]) for level in raw[0]]
    if hasattr(head, 'num_attrib'):
        flat = flatten_levels(raw[0], head.num_attrib)
        return DenseOutputs(
            head, flat[..., 5:], True, flat[..., :4], flat[..., 4], sizes
        )
    logits = flatten_levels(raw[0], head.cls_out_channels)
    if getattr(getattr(head, 'loss_cls', None), 'activated', False):
        logits = torch.logit(logits.float(), eps=PROBABILITY_FLOOR)
    return DenseOutputs(
        head,
        logits,
        bool(getattr(head, 'use_sigmoid_cls', True)),
        _vectors(head, raw, 1),
        _numbers(head, raw),
        sizes,
    )


def _vectors(head: Any, raw: Any, part: int) -> Tensor | None:
    """What a part of the output predicts for each prior, (B, N, R)."""
    if len(raw) <= part or not _is_maps(raw[part]):
        return None
    count = head.prior_generator.num_base_priors[0]
    width, rest = divmod(raw[part][0].shape[1], count)
    return None if rest else flatten_levels(raw[part], width)


def _numbers(head: Any, raw: Any) -> Tensor | None:
    values = _vectors(head, raw, 2)
    one_each = values is not None and values.shape[-1] == 1
    return values[..., 0] if one_each and values is not None else None


def _is_maps(part: Any) -> bool:
    return (
        isinstance(part, list | tuple)
        and bool(part)
        and all(isinstance(m, Tensor) and m.dim() == 4 for m in part)
    )


def _check_structure(head: Any, raw: Any) -> None:
    name = type(head).__name__
    if not isinstance(raw, tuple) or not raw or not _is_maps(raw[0]):
        raise ConfigError(
            f'the {name} is no dense head that can be read: expected a tuple '
            f'of lists of maps (B, C, H, W), got {type(raw).__name__}. Use '
            'a method on features, such as mmkd.FeatureHint.'
        )
    width = getattr(head, 'num_attrib', getattr(head, 'cls_out_channels', 0))
    counts = head.prior_generator.num_base_priors
    found = [level.shape[1] for level in raw[0]]
    if found != [count * width for count in counts]:
        raise ConfigError(
            f'the {name} is no dense head that can be read: its first maps '
            f'have {found} channels, expected {width} for each of {counts} '
            'priors a point. Use a method on features, such as '
            'mmkd.FeatureHint.'
        )


def _labels_and_weights(
    dense: DenseOutputs, calls: list[Any]
) -> tuple[Tensor, Tensor]:
    """Labels and weights, (B, N) each, of an assignment's results."""
    shape, classes = dense.logits.shape[:2], dense.head.num_classes
    first = calls[0]
    if hasattr(dense.head, 'num_attrib'):  # YOLOv3: box, object, classes
        targets = torch.cat(first[0], dim=1)
        labels = targets[..., 5:].argmax(-1)
        labels = labels.where(targets[..., 4] > 0, classes)
        weights = (targets[..., 4] > 0) | (torch.cat(first[1], 1) > 0)
    elif isinstance(first[0], Tensor) and first[0].dtype == torch.bool:
        # YOLOX, image by image: a mask, and soft one-hot rows of the objects
        labels = torch.full(shape, classes, device=first[0].device)
        for row, (mask, soft, *_) in zip(labels, calls, strict=True):
            row[mask] = soft.argmax(-1)
        weights = torch.ones_like(labels)
    else:
        parts = first
        if isinstance(first[0], Tensor):  # PAA image by image, YOLOF at once
            parts = [list(part) for part in zip(*calls, strict=True)]
        labels, weights = _first_integers(dense, parts)
    return labels, weights


def _first_integers(
    dense: DenseOutputs, parts: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    """Labels are the first integers; weights follow them, if any."""
    for labels, follower in zip(parts, (*parts[1:], None), strict=True):
        if not _are_integers(labels):
            continue
        joined = _joined(labels, dense)
        if joined is None:
            break
        shapes = [part.shape for part in labels]
        if isinstance(follower, list | tuple) and shapes == [
            getattr(part, 'shape', None) for part in follower
        ]:
            weights = _joined(follower, dense)
            assert weights is not None
            return joined, weights
        return joined, torch.ones_like(joined)
    images, priors = dense.logits.shape[:2]
    raise ConfigError(
        f'the assignment of the {type(dense.head).__name__} cannot be read: '
        f'none of the {len(parts)} parts that it returned holds an integer '
        f'label for each of {priors} priors in {images} images. Use a '
        'method on features, such as mmkd.FeatureHint.'
    )


def _are_integers(parts: Any) -> bool:
    return (
        isinstance(parts, list | tuple)
        and bool(parts)
        and all(
            isinstance(p, Tensor) and p.dtype in (torch.int64, torch.int32)
            for p in parts
        )
    )


def _joined(parts: Any, dense: DenseOutputs) -> Tensor | None:
    """Levels (B, n) or (B * n,), or images (N,), or all at once, to (B, N)."""
    images, priors = dense.logits.shape[:2]
    if sum(part.numel() for part in parts) != images * priors:
        return None
    if len(parts) == images and all(p.numel() == priors for p in parts):
        return torch.stack([part.flatten() for part in parts])
    if parts[0].dim() == 1 and len(parts) != len(dense.sizes):
        return None  # levels and images in an unknown order
    return torch.cat([part.reshape(images, -1) for part in parts], dim=1)


def check_dense(outputs: Outputs, role: str, method: str) -> DenseOutputs:
    """Check that a detector has a dense head, and read its blank outputs.

    Args:
        outputs: The detector's outputs for a blank image.
        role: ``'student'`` or ``'teacher'``, for the message.
        method: The method that asks, for the message.

    Raises:
        ConfigError: If it has none; a transformer's queries are none, since
            those of two detectors do not correspond.
    """
    head = getattr(outputs.model, 'bbox_head', None)
    if not hasattr(head, 'prior_generator'):
        reason = 'it has no dense head'
        if hasattr(outputs.model, 'decoder'):
            reason = (
                'its queries stand for no place in the image, so that those '
                'of two detectors do not correspond'
            )
        raise ConfigError(
            f'{method} fits detectors with a dense head, such as RetinaNet, '
            f'FCOS, ATSS and GFL; the {role} is '
            f'{type(outputs.model).__name__}: {reason}. Use a method on '
            'features, such as mmkd.FeatureHint.'
        )
    return read_dense(head, outputs.raw('bbox_head'))


def check_same_priors(
    student: Any,
    teacher: Any,
    method: str,
    *,
    centres: bool = False,
    shapes: bool = False,
) -> None:
    """Check that the priors of two dense heads correspond one to one.

    Strides and the number of priors a point must be equal; of several, the
    shapes too, which are otherwise free (points may meet anchors).

    Args:
        student: The student's head.
        teacher: The teacher's head.
        method: The method that asks, for the message.
        centres: They must also stand at the same places, as boxes ask for.
        shapes: They must be equal altogether, as assignments ask for.

    Raises:
        ConfigError: If they do not.
    """
    ours, theirs = student.prior_generator, teacher.prior_generator
    facts = [
        (
            'strides',
            [tuple(stride) for stride in ours.strides],
            [tuple(stride) for stride in theirs.strides],
        ),
        ('priors a point', ours.num_base_priors, theirs.num_base_priors),
    ]
    if shapes:
        facts.append(('first priors', _first(ours), _first(theirs)))
    elif centres:
        facts.append(('first centres', _centres(ours), _centres(theirs)))
    for what, mine, other in facts:
        if list(mine) != list(other):
            raise ConfigError(
                f'{method}: the priors of the two dense heads do not '
                f'correspond, the student has the {what} {mine}, the teacher '
                f'{other}. Give both the same anchor_generator (or strides).'
            )
    if max(ours.num_base_priors) > 1 and not all(
        torch.allclose(a.cpu(), b.cpu())
        for a, b in zip(ours.base_anchors, theirs.base_anchors, strict=True)
    ):
        raise ConfigError(
            f'{method}: the several anchors a point of the two dense heads '
            'have other shapes. Give both the same anchor_generator.'
        )


def _first(generator: Any) -> list[list[list[float]]]:
    """The priors at each level's first position, in pixels."""
    ones = [(1, 1)] * generator.num_levels
    return [p.tolist() for p in generator.grid_priors(ones, device='cpu')]


def _centres(generator: Any) -> list[tuple[float, float]]:
    """The centre of each level's first prior, in pixels."""
    first = [priors[0] for priors in _first(generator)]
    if hasattr(generator, 'base_anchors'):
        return [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in first]
    return [(x, y) for x, y, *_ in first]
