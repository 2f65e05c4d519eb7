"""Parts of a detector, run one by one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .record import replaced


def run_dense_head(model: Any, maps: tuple[Tensor, ...]) -> Any:
    """Run a one-stage detector's head on the neck's levels."""
    return model.bbox_head(maps)


def run_rpn(
    model: Any, maps: tuple[Tensor, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return per level logits (B, A * c, H, W), deltas (B, A * 4, H, W)."""
    logits, deltas = model.rpn_head(maps)[:2]
    return logits, deltas


def run_roi_head(
    model: Any,
    maps: tuple[Tensor, ...],
    rois: Tensor,
    stage: int,
    *,
    hold: bool = False,
) -> dict[str, Any]:
    """Run a RoI head on RoIs (N, 5), image index and xyxy in pixels.

    Args:
        model: The detector.
        maps: The neck's levels.
        rois: The boxes, in pixels of the batch.
        stage: The stage. A head with fewer stages uses its last.
        hold: Let batch norms in training use the batch's statistics without
            keeping them.

    Returns:
        ``cls_score`` (N, K + 1) and ``bbox_pred`` (N, 4 or 4 K) or None.
    """
    head = model.roi_head
    arguments: list[Any] = [maps, rois]
    if isinstance(head.bbox_head, nn.ModuleList):
        arguments.insert(0, min(stage, len(head.bbox_head) - 1))
    with _held_statistics(head) if hold else nullcontext():
        return head._bbox_forward(*arguments)


@contextmanager
def _held_statistics(head: nn.Module) -> Iterator[None]:
    """Let batch norms use the batch's statistics without keeping them."""
    norms = [
        module
        for module in head.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def loss_of(
    model: Any,
    maps: Any,
    inputs: Tensor,
    data_samples: Sequence[DetDataSample],
) -> dict[str, Any]:
    """Return a detector's own losses from given levels, but those of masks.

    Args:
        model: The detector, in train mode.
        maps: What its ``extract_feat`` has returned for the images.
        inputs: The batch (B, 3, H, W) that the levels belong to.
        data_samples: The objects of each image. They may be changed.
    """
    with (
        replaced(model, 'extract_feat', lambda *_: maps),
        _without_masks(getattr(model, 'roi_head', None)),
    ):
        return type(model).loss(model, inputs, data_samples)


@contextmanager
def _without_masks(head: Any) -> Iterator[None]:
    """Let a RoI head train no masks, as boxes alone have none."""
    children = getattr(head, '_modules', {})
    mask = children.get('mask_head')
    try:
        if mask is not None:
            children['mask_head'] = None
        yield
    finally:
        if mask is not None:
            children['mask_head'] = mask


def images_of(maps: Any, index: Tensor) -> Any:
    """Return the given images of nested levels (B, …)."""
    if isinstance(maps, Tensor):
        return maps[index]
    return type(maps)(images_of(each, index) for each in maps)


def detect(
    model: Any,
    maps: tuple[Tensor, ...],
    inputs: Tensor,
    data_samples: Sequence[DetDataSample],
) -> list[InstanceData]:
    """Return a detector's own detections from given levels.

    Args:
        model: The detector, in eval mode.
        maps: The neck's levels.
        inputs: The batch (B, 3, H, W) that the levels belong to.
        data_samples: The images' meta data, which is not changed.

    Returns:
        Each image's bboxes (n, 4) as xyxy in pixels of the batch, scores and
        labels (n,).
    """
    samples = [DetDataSample(metainfo=s.metainfo) for s in data_samples]
    with replaced(model, 'extract_feat', lambda *_: maps):
        results = model.predict(inputs, samples, rescale=False)
    return [sample.pred_instances for sample in results]
