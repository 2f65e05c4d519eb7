"""The predictions of dense heads, which are read by their structure.

A dense head predicts classes and a box at every prior (an anchor or a point)
of every level. Heads differ in their names and in what else they predict; here
they are distinguished by what they return.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.models.dense_heads import FCOSHead
from mmdet.structures import DetDataSample
from torch import Tensor

from mmkd.errors import ConfigError
from mmkd.utils import process_share

from .facts import DenseFacts, priors_of
from .logit import logit
from .record import StepRecord, flatten_levels


@dataclass
class DenseOutputs:
    """A dense head's predictions for the N priors of each of B images.

    Priors are in MMDetection's order: level, row, column, prior at a point.
    """

    facts: DenseFacts
    """The facts that say what the numbers mean."""
    logits: Tensor
    """(B, N, K) for a sigmoid head; (B, N, K + 1) for a softmax head, whose
    last column is the background."""
    sizes: list[tuple[int, int]]
    """(H, W) of each level."""
    raw: Any = None
    """What a head of MMDetection returned. Other predictions have none, and
    whoever makes them sets ``regression`` and ``quality``."""

    @property
    def shape(self) -> tuple[int, int]:
        """B and N."""
        return self.logits.shape[0], self.logits.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the predictions are."""
        return self.logits.device

    @property
    def columns(self) -> int:
        """The number of logits of each prior, K or K + 1."""
        return self.logits.shape[2]

    @property
    def class_maps(self) -> Sequence[Tensor] | None:
        """The logits of each level as a head returns them, (B, A * K, H, W).

        None where it does not return logits, or not these alone.
        """
        return None

    @property
    def sigmoid(self) -> bool:
        """Whether the classes are independent binary problems."""
        return self.facts.sigmoid

    @functools.cached_property
    def regression(self) -> Tensor | None:
        """(B, N, R) as the head returns it.

        R is 4 for deltas or distances, and 4 (n + 1) for logits of bins. It is
        None where the boxes are not one vector per prior, or not what the
        head's coder decodes.
        """
        head = self.facts.head
        if self.raw is None:
            return None
        if _is_yolo(head):
            return _yolo_parts(head, self.raw)[..., :4]
        if _decodes_itself(head):
            return None
        return _vectors(head, self.raw, 1)

    @functools.cached_property
    def quality(self) -> Tensor | None:
        """(B, N) logits of centerness, IoU or objectness, if there are any."""
        head = self.facts.head
        if self.raw is None:
            return None
        if _is_yolo(head):
            return _yolo_parts(head, self.raw)[..., 4]
        return _numbers(head, self.raw)

    @property
    def bins(self) -> Tensor | None:
        """(B, N, 4, n + 1) logits of the distances' distributions (DFL)."""
        count = self.facts.reg_max
        if self.regression is None or count is None:
            return None
        if self.regression.shape[-1] != 4 * (count + 1):
            return None
        return self.regression.unflatten(-1, (4, count + 1))

    @functools.cached_property
    def priors(self) -> Tensor:
        """(N, 4) anchors as xyxy, or (N, 2) points as xy, in pixels."""
        levels = self.facts.generator.grid_priors(
            self.sizes, device=self.device
        )
        return torch.cat(list(levels))

    @functools.cached_property
    def centres(self) -> Tensor:
        """(N, 2) the priors' centres, xy in pixels."""
        if self.facts.has_anchors:
            return (self.priors[:, :2] + self.priors[:, 2:]) / 2
        return self.priors[:, :2]

    def largest(self, classes: Tensor | None = None) -> Tensor:
        """Return (B, N), the largest logit of each prior.

        Args:
            classes: The columns that count; all by default.
        """
        if self.class_maps is None:
            logits = self.logits
            return (logits if classes is None else logits[..., classes]).amax(
                -1
            )
        best = []
        for level in self.class_maps:
            columns = level.unflatten(1, (-1, self.columns))
            if classes is not None:
                columns = columns[:, :, classes]
            best.append(columns.amax(2))
        return flatten_levels(best, 1)[..., 0]

    def inside(self, data_samples: Sequence[DetDataSample]) -> Tensor:
        """Return (B, N), which priors have their centre within the image."""
        shapes = torch.tensor(
            [sample.img_shape[1::-1] for sample in data_samples],
            dtype=self.centres.dtype,
        ).to(self.centres.device, non_blocking=True)
        return (self.centres < shapes[:, None]).all(-1)

    def decoded(self) -> Tensor:
        """Return all boxes, (B * N, 4) as xyxy in pixels."""
        assert self.regression is not None
        priors = self.priors.expand(len(self.regression), -1, -1)
        return self.facts.coder.decode(
            priors.flatten(0, 1), self.regression.float().flatten(0, 1)
        )

    def boxes_at(self, index: tuple[Tensor, Tensor]) -> Tensor:
        """Return the boxes of P chosen priors, (P, 4) as xyxy.

        Deltas are decoded to pixels. Distances stay in the head's unit and
        around the prior, because the GIoU of two boxes does not depend on
        either. It is only for heads whose ``facts.has_boxes`` is true.

        Args:
            index: The image and the prior of each box, (P,) each.
        """
        assert self.regression is not None
        if self.bins is not None:
            bins = self.bins[index].float().softmax(-1)  # (P, 4, n + 1)
            values = torch.arange(bins.shape[-1]).to(bins)
            distances = (bins * values).sum(-1)  # `@` would be rounded
        elif isinstance(self.facts.head, FCOSHead):
            distances = self.regression[index].float()
        else:
            deltas = self.regression[index].float()
            return self.facts.coder.decode(self.priors[index[1]], deltas)
        return torch.cat([-distances[:, :2], distances[:, 2:]], dim=1)


class HeadOutputs(DenseOutputs):
    """What a head of MMDetection predicts, with logits joined when read.

    With many classes they are larger than all else that a step keeps.
    """

    def __init__(
        self, facts: DenseFacts, sizes: list[tuple[int, int]], raw: Any
    ) -> None:
        self.facts, self.sizes, self.raw = facts, sizes, raw

    @functools.cached_property
    def logits(self) -> Tensor:  # type: ignore[override]
        with torch.enable_grad():  # wherever they are first read
            logits = flatten_levels(self.raw[0], self.columns)
            return logit(logits) if self.facts.probabilities else logits

    @property
    def shape(self) -> tuple[int, int]:
        counts = self.facts.priors_per_point
        numbers = zip(self.sizes, counts, strict=True)
        return len(self.raw[0][0]), sum(h * w * n for (h, w), n in numbers)

    @property
    def device(self) -> torch.device:
        return self.raw[0][0].device

    @property
    def columns(self) -> int:
        return self.facts.head.cls_out_channels

    @property
    def class_maps(self) -> Sequence[Tensor] | None:
        return None if self.facts.probabilities else self.raw[0]


@dataclass
class DenseTargets:
    """The student's own assignment of its priors."""

    labels: Tensor
    """(B, N); 0..K-1 are objects, and the rest is background or ignored."""
    weights: Tensor
    """(B, N) weights of the class loss. They are 0 for padding and for what
    the loss leaves out: ignored priors, or in YOLOv3 and YOLOX all but the
    positives."""
    stock_weights: Tensor
    """(B, N) the same weights as the loss has them, in the padding as well."""
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
        """The number of positives, averaged over the processes.

        In all of them together it is at least 1.
        """
        return process_share(self.positive.sum(), least=1)


def student_dense(student: StepRecord) -> DenseOutputs:
    """Read the dense predictions of a network in training, once per step."""
    if 'dense' not in student.cache:
        facts = student.facts.dense
        assert facts is not None
        student.cache['dense'] = read_dense(facts, student.raw('bbox_head'))
    return student.cache['dense']


def student_targets(
    student: StepRecord, data_samples: Sequence[DetDataSample]
) -> DenseTargets:
    """Return what the student's own loss has assigned in this step.

    Priors in the padding get weight 0.

    Raises:
        TapError: If the head has assigned nothing in a known way.
        ConfigError: If what it returned holds no label for each prior.
    """
    if 'targets' not in student.cache:
        dense = student_dense(student)
        labels, stock = assigned(dense, student.dense_targets)
        stock = stock.float()
        weights = stock * dense.inside(data_samples)
        targets = DenseTargets(labels, weights, stock, dense.facts.classes)
        student.cache['targets'] = targets
    return student.cache['targets']


def anchors_on_images(
    dense: DenseOutputs, data_samples: Sequence[DetDataSample]
) -> tuple[Tensor, Tensor]:
    """Return the anchors (B, N, 4), and which lie on each image (B, N)."""
    anchors, flags = dense.facts.head.get_anchors(
        dense.sizes,
        [sample.metainfo for sample in data_samples],
        device=dense.device,
    )
    return (
        torch.cat(anchors[0]).expand(len(anchors), -1, -1),
        torch.stack([torch.cat(levels) for levels in flags]),
    )


def read_dense(facts: DenseFacts, raw: Any) -> DenseOutputs:
    """Sort out what a dense head of MMDetection returned.

    Args:
        facts: The facts of the head.
        raw: Its output: a tuple of lists of maps (B, A * c, H, W), one map
            per level. The first list holds the classes, and a third list
            with one channel per prior holds a quality or objectness. In
            YOLOv3 all of them are one map.

    Raises:
        ConfigError: If the head returned anything else.
    """
    head = facts.head
    _check_structure(head, raw)
    sizes = [tuple(level.shape[-2:]) for level in raw[0]]
    if _is_yolo(head):
        logits = _yolo_parts(head, raw)[..., 5:]
        return DenseOutputs(facts, logits, sizes, raw)
    return HeadOutputs(facts, sizes, raw)


def _is_yolo(head: Any) -> bool:
    """Return whether one map has boxes, objectness and classes (YOLOv3)."""
    return hasattr(head, 'num_attrib')


def _yolo_parts(head: Any, raw: Any) -> Tensor:
    return flatten_levels(raw[0], head.num_attrib)


def _vectors(head: Any, raw: Any, part: int) -> Tensor | None:
    """Return what a part of the output predicts per prior, (B, N, R)."""
    if len(raw) <= part or not _is_maps(raw[part]):
        return None
    count = priors_of(head).num_base_priors[0]
    width, rest = divmod(raw[part][0].shape[1], count)
    return None if rest else flatten_levels(raw[part], width)


def _decodes_itself(head: Any) -> bool:
    """Return whether boxes bypass the head's own coder (FoveaBox)."""
    return hasattr(head, 'bbox_coder') and hasattr(head, '_bbox_decode')


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
    counts = priors_of(head).num_base_priors
    found = [level.shape[1] for level in raw[0]]
    if found != [count * width for count in counts]:
        raise ConfigError(
            f'the {name} is no dense head that can be read: its first maps '
            f'have {found} channels, expected {width} for each of {counts} '
            'priors per point. Use a method on features, such as '
            'mmkd.FeatureHint.'
        )


def assigned(dense: DenseOutputs, calls: list[Any]) -> tuple[Tensor, Tensor]:
    """Return labels and weights, (B, N) each, of an assignment's results."""
    shape, classes = dense.shape, dense.facts.classes
    first = calls[0]
    if _is_yolo(dense.facts.head):  # box, object, classes
        targets = torch.cat(first[0], dim=1)
        positive = targets[..., 4] > 0
        labels = targets[..., 5:].argmax(-1).where(positive, classes)
        weights = positive
    elif isinstance(first[0], Tensor) and first[0].dtype == torch.bool:
        # YOLOX gives, image by image, a mask and soft one-hot rows of objects
        weights = torch.stack([mask for mask, *_ in calls])
        labels = torch.full(shape, classes, device=weights.device)
        for row, (mask, soft, *_) in zip(labels, calls, strict=True):
            row[mask] = soft.argmax(-1)
    else:
        parts = calls[-1]  # RepPoints assigns twice; its classes use this one
        if isinstance(first[0], Tensor):  # PAA image by image, YOLOF at once
            parts = [list(part) for part in zip(*calls, strict=True)]
        labels, weights = _first_integers(dense, parts)
    return labels, weights


def _first_integers(
    dense: DenseOutputs, parts: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    """Find the labels, the first integers, and the weights after them."""
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
    images, priors = dense.shape
    raise ConfigError(
        f'the assignment of the {dense.facts.kind} cannot be read: '
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
    """Join levels (B, n) or (B * n,), or images (N,), to (B, N)."""
    images, priors = dense.shape
    if sum(part.numel() for part in parts) != images * priors:
        return None
    if len(parts) == images and all(p.numel() == priors for p in parts):
        return torch.stack([part.flatten() for part in parts])
    if len(parts) == 1 and parts[0].dim() == 1:
        # FoveaBox is flat as its loss's logits: level by level, then image
        count = dense.facts.priors_per_point
        numbers = zip(dense.sizes, count, strict=True)
        parts = parts[0].split([images * h * w * n for (h, w), n in numbers])
    if parts[0].dim() == 1 and len(parts) != len(dense.sizes):
        return None  # levels and images in an unknown order
    return torch.cat([part.reshape(images, -1) for part in parts], dim=1)
