"""Objects that count in part, and regions to ignore, in stock losses.

Each object of an image may carry a weight and a softer target of its class,
and the image regions that the loss is to leave out. Stock heads know none of
these. Within :func:`weighted_objects`, their own targets are changed as soon
as they are made. What a head divides its sums by stays as it is.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from mmdet.models.dense_heads import (
    AnchorHead,
    ATSSHead,
    DeformableDETRHead,
    DETRHead,
    DINOHead,
    GFLHead,
    RPNHead,
)
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_overlaps
from mmengine.structures import InstanceData
from torch import Tensor

from mmkd.detectors.facts import DetectorFacts, box_heads
from mmkd.detectors.record import intercepted, replaced
from mmkd.detectors.two_stage import check_two_stage
from mmkd.errors import ConfigError

WEIGHTS = 'object_weights'
"""The field of ``gt_instances`` with a weight for each object."""
TARGETS = 'class_targets'
"""The field with the target of each object's class, from 0 to 1."""
REGIONS = 'ignored_regions'
"""The entry of its meta data with the regions, (R, 4) xyxy in pixels."""
MIN_SHARE = 0.5
"""A prior is ignored if at least this share of it lies within a region."""
FITTING = (
    'RetinaNet, ATSS, GFL, Faster and Cascade R-CNN without masks, DETR, '
    'Conditional DETR, DAB-DETR, Deformable DETR and DINO'
)
OWN_BOX_WEIGHTS = (ATSSHead, GFLHead)
"""Heads that weight the losses of boxes by a quality of their own."""
WHOLE_LOSSES = (
    *(AnchorHead, RPNHead, ATSSHead, GFLHead),
    *(DETRHead, DeformableDETRHead, DINOHead),
)
"""Heads whose ``loss_by_feat`` adds no losses on other targets."""
OF_BOXES = ('loss_bbox', 'loss_dfl', 'loss_centerness')


def with_objects(
    sample: DetDataSample, objects: InstanceData, regions: Tensor
) -> DetDataSample:
    """Return a data sample with other objects, and with regions to ignore.

    Args:
        sample: The image, which is left as it is.
        objects: ``bboxes`` (n, 4) as xyxy in pixels, ``labels``, and the
            fields :data:`WEIGHTS` and :data:`TARGETS`, (n,) each.
        regions: (R, 4) xyxy in pixels.
    """
    objects.set_metainfo({REGIONS: regions})
    changed = sample.new()
    changed.gt_instances = objects
    return changed


def check_weighable(facts: DetectorFacts, method: str) -> None:
    """Check that a detector's stock losses can weight objects.

    Raises:
        ConfigError: If a part of it makes targets or losses of its own.
    """
    if facts.is_two_stage:
        check_two_stage(facts, 'student', method)
    model = facts.model
    reason = _why_unfit(model, facts.is_two_stage)
    if reason:
        raise ConfigError(
            f'{method} gives objects a weight in the stock losses of '
            f'{FITTING}; the student is {facts.name}: {reason}.'
        )


def _why_unfit(model: Any, two_stage: bool) -> str | None:
    if two_stage and getattr(model.roi_head, 'with_mask', False):
        return 'its objects need masks, which detections do not have'
    head = model.rpn_head if two_stage else getattr(model, 'bbox_head', None)
    if head is None or kind_of(head) is None:
        return f'its {type(head).__name__} makes targets or losses of its own'
    cfg = getattr(head, 'train_cfg', None) or {}
    if kind_of(head) in OWN_BOX_WEIGHTS and cfg.get('pos_weight', -1) > 0:
        return 'train_cfg.pos_weight weights its classes; set it to -1'
    return None


def kind_of(head: Any) -> type | None:
    """Return the stock head whose targets and losses a head has, if any."""
    own: Any = type(head)
    whole = [kind.loss_by_feat for kind in WHOLE_LOSSES]
    if getattr(own, 'loss_by_feat', None) not in whole:
        return None
    for kind in (AnchorHead, ATSSHead, GFLHead, DETRHead):
        if (
            own._get_targets_single is kind._get_targets_single
            and own.loss_by_feat_single is kind.loss_by_feat_single
        ):
            return kind
    return None


def takes_soft_targets(facts: DetectorFacts) -> bool:
    """Return whether a detector's class loss heeds :data:`TARGETS`."""
    return kind_of(getattr(facts.model, 'bbox_head', None)) is GFLHead


@contextmanager
def weighted_objects(model: Any) -> Iterator[None]:
    """Let a detector's own loss heed weights and regions.

    Args:
        model: A detector that :func:`check_weighable` has accepted, whose
            loss is given data samples of :func:`with_weights`.
    """
    with ExitStack() as stack:
        for name in ('rpn_head', 'bbox_head'):
            head = getattr(model, name, None)
            if head is not None:
                stack.enter_context(_weighted_head(head))
        for head in box_heads(model):
            stack.enter_context(intercepted(head, 'get_targets', _weigh_rois))
        if box_heads(model):
            stack.enter_context(_weighted_roi_head(model.roi_head))
        yield


# ------------------------------------------------------------- dense heads


@contextmanager
def _weighted_head(head: Any) -> Iterator[None]:
    with ExitStack() as stack:
        single = '_get_targets_single'
        if kind_of(head) is DETRHead:
            weigh_queries = partial(
                _query_targets, head, head._get_targets_single
            )
            stack.enter_context(replaced(head, single, weigh_queries))
            if hasattr(head, '_get_dn_targets_single'):
                stack.enter_context(
                    intercepted(head, '_get_dn_targets_single', _weigh_noised)
                )
        else:
            stack.enter_context(intercepted(head.assigner, 'assign', _ignore))
            targets: list[Tensor] = []
            weigh = partial(_weigh_priors, head.num_classes, targets)
            stack.enter_context(intercepted(head, single, weigh))
        if kind_of(head) in OWN_BOX_WEIGHTS:
            own = head.loss_by_feat_single
            loss = partial(_level_loss, head, own, targets)
            stack.enter_context(replaced(head, 'loss_by_feat_single', loss))
        yield


def _ignore(result: Any, *args: Any, **kwargs: Any) -> None:
    """Ignore the background within an image's regions, as assigners do."""
    predicted = args[0] if args else kwargs['pred_instances']
    inside = _inside(predicted.priors, _objects(*args, **kwargs))
    result.gt_inds[inside & (result.gt_inds == 0)] = -1


def _weigh_priors(
    classes: int,
    targets: list[Tensor],
    result: tuple,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Weight the targets of the priors of one image's objects.

    Args:
        classes: The number of the head's classes.
        targets: The list to which the priors' class targets (N,) are added.
        result: The head's own targets, which are changed.
        *args: The head's arguments.
        **kwargs: The head's arguments.
    """
    if result[0] is None:  # no prior lies on the image
        return
    sampled = next(part for part in result if hasattr(part, 'pos_inds'))
    # ATSS and GFL return the anchors first.
    first = 0 if result[0].dim() == 1 else 1
    labels, label_weights, _, box_weights = result[first : first + 4]
    # The targets have gaps where priors leave the image, but their order.
    positive = ((labels >= 0) & (labels < classes)).nonzero()[:, 0]
    owner = sampled.pos_assigned_gt_inds[sampled.pos_inds.argsort()]
    objects = _objects(*args, **kwargs)
    weights = getattr(objects, WEIGHTS)[owner]
    label_weights[positive] *= weights
    box_weights[positive] *= weights[:, None]
    soft = torch.ones_like(label_weights)
    soft[positive] = getattr(objects, TARGETS)[owner]
    targets.append(soft)


def _level_loss(
    head: Any,
    loss: Callable[..., Any],
    targets: list[Tensor],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Compute the losses of one level with weighted boxes.

    Args:
        head: ATSS's or GFL's head.
        loss: Its ``loss_by_feat_single``.
        targets: Each image's class targets at the priors of this level and
            the next ones; those of this level are taken away.
        *args: The arguments of the loss.
        **kwargs: The arguments of the loss.
    """
    given = signature(loss).bind(*args, **kwargs).arguments
    labels, weights = given['labels'], given['label_weights']
    count = labels.shape[1]  # (B, N of this level)
    soft = torch.stack([each[:count] for each in targets]).flatten()
    targets[:] = [each[count:] for each in targets]
    positive = (labels >= 0) & (labels < head.num_classes)
    weights = weights[positive]
    with ExitStack() as stack:
        for name in OF_BOXES:
            part = getattr(head, name, None)
            if part is not None:
                weighted = partial(_weighted_loss, part.forward, weights)
                stack.enter_context(replaced(part, 'forward', weighted))
        if kind_of(head) is GFLHead:
            part = head.loss_cls
            softened = partial(_softened_loss, part.forward, soft)
            stack.enter_context(replaced(part, 'forward', softened))
        return loss(*args, **kwargs)


def _softened_loss(
    loss: Callable[..., Tensor],
    soft: Tensor,
    pred: Tensor,
    target: tuple[Tensor, Tensor],
    **kwargs: Any,
) -> Tensor:
    """Compute the quality focal loss with softer targets of the positives."""
    labels, quality = target
    return loss(pred, (labels, quality * soft), **kwargs)


def _weighted_loss(
    loss: Callable[..., Tensor],
    weights: Tensor,
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Compute a loss of positives; the four sides of a box may be rows."""
    weights = weights.repeat_interleave(len(pred) // max(len(weights), 1))
    if weight is not None:
        weights = weight * weights
    return loss(pred, target, weight=weights, **kwargs)


# ------------------------------------------------------------------ queries


def _query_targets(
    head: Any,
    targets: Callable[..., tuple],
    cls_score: Tensor,
    bbox_pred: Tensor,
    gt_instances: InstanceData,
    img_meta: dict,
) -> tuple:
    """Weight the targets of the queries of one image and one layer."""
    matches: list[Any] = []

    def note(result: Any, *_: Any, **__: Any) -> None:
        matches.append(result)

    with intercepted(head.assigner, 'assign', note):
        found = targets(cls_score, bbox_pred, gt_instances, img_meta)
    _, label_weights, _, box_weights, *_ = found
    owner = matches[0].gt_inds
    # An entry in front for the queries that are matched with no object.
    weights = getattr(gt_instances, WEIGHTS)
    weights = torch.cat([weights.new_ones(1), weights])[owner]
    height, width = img_meta['img_shape'][:2]
    factor = bbox_pred.new_tensor([width, height, width, height])
    boxes = bbox_cxcywh_to_xyxy(bbox_pred.detach()) * factor
    ignored = _inside(boxes, gt_instances) & (owner == 0)
    label_weights *= weights.masked_fill(ignored, 0)
    box_weights *= weights[:, None]
    return found


def _weigh_noised(result: tuple, *args: Any, **kwargs: Any) -> None:
    """Weight the denoising queries made from one image's objects."""
    _, label_weights, _, box_weights, positive, negative = result
    weights = getattr(_objects(*args, **kwargs), WEIGHTS)
    if len(weights):
        weights = weights.repeat(len(positive) // len(weights))
        label_weights[positive] *= weights
        label_weights[negative] *= weights
        box_weights[positive] *= weights[:, None]


# --------------------------------------------------------------- RoI heads


@contextmanager
def _weighted_roi_head(roi_head: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for name, method, after in (
            ('bbox_assigner', 'assign', _ignore),
            ('bbox_sampler', 'sample', _note_weights),
        ):
            parts = getattr(roi_head, name)
            for part in parts if isinstance(parts, list) else [parts]:
                stack.enter_context(intercepted(part, method, after))
        yield


def _note_weights(sampled: Any, *args: Any, **kwargs: Any) -> None:
    """Keep the weights of the sampled objects, for :func:`_weigh_rois`."""
    weights = getattr(_objects(*args, **kwargs), WEIGHTS)
    sampled.object_weights = weights[sampled.pos_assigned_gt_inds]


def _weigh_rois(result: tuple, sampled: list[Any], *_: Any, **__: Any) -> None:
    """Weight the targets of the RoIs of all images, positives first."""
    _, label_weights, _, box_weights = result
    weights = [
        part
        for each in sampled
        for part in (
            each.object_weights,
            each.object_weights.new_ones(len(each.neg_priors)),
        )
    ]
    label_weights *= torch.cat(weights)
    box_weights *= torch.cat(weights)[:, None]


# ---------------------------------------------------------------- one image


def _objects(*args: Any, **kwargs: Any) -> InstanceData:
    """Find an image's objects among the arguments of a head's method."""
    return next(
        each
        for each in (*args, *kwargs.values())
        if isinstance(each, InstanceData) and WEIGHTS in each
    )


def _inside(boxes: Tensor, objects: InstanceData) -> Tensor:
    """Return (N,), which of N boxes lie in one of the image's regions."""
    regions = objects.metainfo[REGIONS]
    if not len(regions):
        return boxes.new_zeros(len(boxes), dtype=torch.bool)
    shares = bbox_overlaps(boxes[:, :4], regions, mode='iof')
    return shares.amax(1) >= MIN_SHARE
