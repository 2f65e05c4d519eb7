"""What a transformer detector's decoder predicts for its queries.

Detectors like DETR refine queries layer by layer, and predict classes and a
box for each query after every layer. They do so in several forms; here is one.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from torch import Tensor

from mmkd.errors import ConfigError, TapError

from .record import StepRecord

QUERY_TAPS = (
    *('pre_decoder', 'forward_decoder', 'gen_encoder_output_proposals'),
    'decoder.select_distinct_queries',
)
"""The paths with which a detector must be recorded to read its queries."""


@dataclass
class QueryOutputs:
    """A decoder's predictions for the Q queries of each of B images.

    There are L decoder layers and K classes. Only the queries that are
    matched with objects are here: denoising queries, which precede them in a
    training step, and DDQ's auxiliary queries, which follow, are split off.
    Boxes are normalised by the size of the image without its padding.
    """

    head: Any
    logits: Tensor
    """(L, B, Q, K) of a sigmoid head; (L, B, Q, K + 1) of a softmax head,
    whose last column is the background."""
    boxes: Tensor
    """(L, B, Q, 4) as cxcywh."""
    sigmoid: bool
    """Whether the classes are independent binary problems."""
    classes: int
    """K."""
    hidden: Tensor
    """(L, B, Q, C) the queries after each layer, which the head is given."""
    queries: Tensor
    """(B, Q, C) what the queries contain before the first layer; zeros in
    DETR, Conditional DETR and DAB-DETR (without patterns)."""
    positions: Tensor | None
    """(B, Q, C) the positional part of the queries; None where it is computed
    from the references (DAB-DETR, DINO and DDQ)."""
    references: list[Tensor] | None
    """For each layer (B, Q, 2) as cxcy or (B, Q, 4) as cxcywh, which its boxes
    are relative to; None in DETR, whose queries have no reference."""
    denoising: int
    """How many denoising queries were split off; 0 outside training."""
    distinct: Tensor
    """(L, B, Q) which queries each layer's loss and the detections use: all
    but those that overlap a better one in DDQ (MMDetection also uses all of
    an image whose first query is kept)."""
    encoder: tuple[Tensor, Tensor] | None
    """Features (B, N, C) at the encoder's N points, level by level, and
    anchors (B, N, 4) before the sigmoid; None if it proposes nothing."""

    @property
    def scores(self) -> Tensor:
        """(L, B, Q, K) probabilities of the classes, without background."""
        if self.sigmoid:
            return self.logits.sigmoid()
        return self.logits.softmax(-1)[..., : self.classes]

    @functools.cached_property
    def encoder_logits(self) -> Tensor | None:
        """(B, N, K or K + 1) for the proposal at each of the encoder's points.

        Deformable DETR trains only the first column: an object or none.
        """
        if self.encoder is None:
            return None
        last = self.head.num_pred_layer - 1
        return self.head.cls_branches[last](self.encoder[0])

    @functools.cached_property
    def encoder_boxes(self) -> Tensor | None:
        """(B, N, 4) as cxcywh, the proposal at each of the encoder's points.

        All four numbers are 1 at points that propose nothing, in the padding
        and, in MMDetection, next to the border.
        """
        if self.encoder is None:
            return None
        last = self.head.num_pred_layer - 1
        deltas = self.head.reg_branches[last](self.encoder[0])
        return (deltas + self.encoder[1]).sigmoid()

    def boxes_in_pixels(self, data_samples: Sequence[DetDataSample]) -> Tensor:
        """(L, B, Q, 4) xyxy in pixels of the resized images, not clipped."""
        factors = torch.tensor(
            [sample.img_shape[1::-1] * 2 for sample in data_samples],
            dtype=self.boxes.dtype,
        ).to(self.boxes.device, non_blocking=True)
        return bbox_cxcywh_to_xyxy(self.boxes) * factors[:, None]


def check_queries(record: StepRecord, role: str, method: str) -> QueryOutputs:
    """Check that a detector has queries, and read its blank outputs.

    Args:
        record: The detector's outputs for a blank image.
        role: ``'student'``, ``'teacher'`` or a peer's name.
        method: The method that asks, for the message.

    Raises:
        ConfigError: If it has none; else as :func:`read_queries`.
    """
    head = getattr(record.model, 'bbox_head', None)
    reason = ''
    if head is None or not hasattr(record.model, 'forward_decoder'):
        reason = 'it has no decoder that predicts boxes from queries'
    elif hasattr(head, 'max_text_len'):  # Grounding DINO
        reason = 'it compares queries with words, and has no logits of classes'
    if reason:
        raise ConfigError(
            f'{method} fits detectors with queries, such as DETR, Deformable '
            f'DETR, DINO and DDQ; the {role} is {type(record.model).__name__}:'
            f' {reason}. Use a method on features, such as mmkd.FeatureHint.'
        )
    return read_queries(record)


def read_queries(record: StepRecord) -> QueryOutputs:
    """Sort out what a transformer detector has predicted in a step.

    Args:
        record: A record, with :data:`QUERY_TAPS` as paths, of the detector's
            own loss or of its forward pass in eval mode.

    Raises:
        ConfigError: If its head returned anything else than query outputs.
        TapError: If its decoder did not run or was not recorded.
    """
    if 'queries' not in record.cache:
        record.cache['queries'] = _read(record)
    return record.cache['queries']


def assigned(record: StepRecord) -> tuple[Tensor, Tensor]:
    """Read which objects a detector's own loss has matched with its queries.

    Returns:
        Labels (L, B, Q), 0..K-1 of objects and K of the background, and boxes
        (L, B, Q, 4) as normalised cxcywh, zeros for the background.

    Raises:
        TapError: If it was not recorded, or has not computed its loss.
    """
    queries = read_queries(record)
    used, boxes = queries.distinct, torch.zeros_like(queries.boxes)
    labels = torch.full_like(used, queries.classes, dtype=torch.long)
    # A call per layer; another one, for the encoder, may follow.
    calls = record.dense_targets[: len(labels)]
    for layer, (their_labels, _, their_boxes, *_) in enumerate(calls):
        for image, mask in enumerate(used[layer]):
            labels[layer, image, mask] = their_labels[image]
            boxes[layer, image, mask] = their_boxes[image].to(boxes.dtype)
    return labels, boxes


def _read(record: StepRecord) -> QueryOutputs:
    model: Any = record.model
    try:
        inputs, for_head = record.raw('pre_decoder')
        decoded = record.raw('forward_decoder')
    except TapError as error:
        raise TapError(
            f'the queries of {type(model).__name__} cannot be read: it has no '
            'decoder, or that did not run, or it was not recorded with '
            f'mmkd.detectors.queries.QUERY_TAPS as paths.{record.note}'
        ) from error
    head = model.bbox_head
    logits, boxes = _checked(head, record.raw('bbox_head'))
    extra = for_head.get('dn_meta') or {}
    first = extra.get('num_denoising_queries', 0)
    own = slice(first, logits.shape[2] - extra.get('num_dense_queries', 0))
    queries, positions = inputs['query'], inputs.get('query_pos')
    if positions is not None:  # DAB-DETR: its references, before the sigmoid
        same = positions.shape == queries.shape
        positions = positions[:, own] if same else None
    encoder = None
    if getattr(model, 'as_two_stage', False):
        encoder = record.raw('gen_encoder_output_proposals')
    return QueryOutputs(
        head=head,
        logits=logits[:, :, own],
        boxes=boxes[:, :, own],
        sigmoid=head.cls_out_channels == head.num_classes,
        classes=head.num_classes,
        # DETR's ``predict`` asks its head for the last layer alone.
        hidden=decoded['hidden_states'][-len(logits) :, :, own],
        queries=queries[:, own],
        positions=positions,
        references=_references(decoded, len(logits), own),
        denoising=first,
        distinct=_distinct(record, logits, own),
        encoder=encoder,
    )


def _checked(head: Any, raw: Any) -> tuple[Tensor, Tensor]:
    width = head.cls_out_channels
    shapes = [tuple(getattr(part, 'shape', ())) for part in raw]
    first = (*shapes, ())[0][:3]
    if len(first) != 3 or shapes != [(*first, width), (*first, 4)]:
        raise ConfigError(
            f'the {type(head).__name__} predicts for no queries that can be '
            f'read: expected logits (layers, images, queries, {width}) and '
            f'boxes (layers, images, queries, 4), got the shapes {shapes}. '
            'Use a method on features, such as mmkd.FeatureHint.'
        )
    return raw


def _references(decoded: Any, layers: int, own: slice) -> list[Tensor] | None:
    references = decoded.get('references')
    if references is None:
        return None
    depth = len(decoded['hidden_states'])
    if isinstance(references, Tensor) and references.dim() == 3:
        references = [references] * depth  # Conditional DETR: never refined
    # Where references are refined, one more follows the last layer.
    return [part[:, own] for part in references[:depth]][-layers:]


def _distinct(record: StepRecord, logits: Tensor, own: slice) -> Tensor:
    distinct = torch.ones_like(logits[:, :, own, 0], dtype=torch.bool)
    selects = hasattr(record.model.decoder, 'select_distinct_queries')
    if selects and len(logits) > 1:  # after each layer but the last
        masks = record.features('decoder.select_distinct_queries')
        for layer, mask in zip(distinct[1:], masks, strict=True):
            # (B * heads, queries, queries), True where one ignores another
            layer[:] = ~mask[:: len(mask) // len(layer), own.start, own]
    return distinct
