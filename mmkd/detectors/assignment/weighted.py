"""Objects that count in part, and regions to ignore, in stock losses.

The objects of an image may carry a weight each, and the image regions that
the loss is to leave out. Stock heads know neither; within
:func:`weighted_objects` their own targets are changed as soon as they are
made. What a head divides its sums by stays as it is.
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
    DETRHead,
    DINOHead,
    GFLHead,
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
OF_BOXES = ('loss_bbox', 'loss_dfl', 'loss_centerness')


def with_weights(
    sample: DetDataSample,
    boxes: Tensor,
    labels: Tensor,
    weights: Tensor,
    regions: Tensor,
) -> DetDataSample:
    """Return a data sample with more objects and with regions to ignore.

    Args:
        sample: The image, which is left as it is. Its own objects weigh 1.
        boxes: (n, 4) the further objects, xyxy in pixels.
        labels: (n,) their labels.
        weights: (n,) their weights.
        regions: (R, 4) the regions, xyxy in pixels.
    """
    own = sample.gt_instances
    objects = InstanceData(
        metainfo={REGIONS: regions},
        bboxes=torch.cat([own.bboxes, boxes.to(own.bboxes)]),
        labels=torch.cat([own.labels, labels.to(own.labels)]),
    )
    ones = weights.new_ones(len(own.bboxes))
    setattr(objects, WEIGHTS, torch.cat([ones, weights]))
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
    own = type(head)
    for kind in (AnchorHead, ATSSHead, GFLHead, DETRHead):
        if all(
            getattr(own, name, None) is getattr(kind, name)
            for name in ('_get_targets_single', 'loss_by_feat_single')
        ):
            denoises = '_get_dn_targets_single'
            stock = getattr(DINOHead, denoises)
            return kind if getattr(own, denoises, stock) is stock else None
    return None


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
            own = getattr(head, single)
            targets = partial(_query_targets, head, own)
            stack.enter_context(replaced(head, single, targets))
            if hasattr(head, '_get_dn_targets_single'):
                stack.enter_context(
                    intercepted(head, '_get_dn_targets_single', _weigh_noised)
                )
        else:
            stack.enter_context(intercepted(head.assigner, 'assign', _ignore))
            weigh = partial(_weigh_priors, head.num_classes)
            stack.enter_context(intercepted(head, single, weigh))
        if kind_of(head) in OWN_BOX_WEIGHTS:
            own = head.loss_by_feat_single
            loss = partial(_with_box_weights, head, own)
            stack.enter_context(replaced(head, 'loss_by_feat_single', loss))
        yield


def _ignore(result: Any, *args: Any, **kwargs: Any) -> None:
    """Ignore the background within an image's regions, as assigners do."""
    objects = _objects(*args, **kwargs)
    priors = (kwargs.get('pred_instances') or args[0]).priors
    inside = _inside(priors, objects)
    result.gt_inds[inside & (result.gt_inds == 0)] = -1


def _weigh_priors(
    classes: int, result: tuple, *args: Any, **kwargs: Any
) -> None:
    """Weight the targets of the priors of one image's objects."""
    if result[0] is None:  # no prior lies on the image
        return
    sampled = next(part for part in result if hasattr(part, 'pos_inds'))
    # ATSS and GFL return the anchors first.
    first = 0 if result[0].dim() == 1 else 1
    labels, label_weights, _, box_weights = result[first : first + 4]
    # The targets have gaps where priors leave the image, but their order.
    positive = ((labels >= 0) & (labels < classes)).nonzero()[:, 0]
    owner = sampled.pos_assigned_gt_inds[sampled.pos_inds.argsort()]
    weights = getattr(_objects(*args, **kwargs), WEIGHTS)[owner]
    label_weights[positive] *= weights
    box_weights[positive] *= weights[:, None]


def _with_box_weights(
    head: Any, loss: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Compute the losses of one level with weighted boxes."""
    given = signature(loss).bind(*args, **kwargs).arguments
    labels, weights = (
        given[name].reshape(-1) for name in ('labels', 'label_weights')
    )
    positive = (labels >= 0) & (labels < head.num_classes)
    weights = weights[positive]
    with ExitStack() as stack:
        for name in OF_BOXES:
            part = getattr(head, name, None)
            if part is not None:
                weighted = partial(_weighted_loss, part.forward, weights)
                stack.enter_context(replaced(part, 'forward', weighted))
        return loss(*args, **kwargs)


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
