"""A detector as an ONNX graph, from the pixels of an image to its boxes.

The graph is a trace of the detector's own ``predict``. Tracing keeps what one
image has done, so that three things are changed while it lasts, none of them
in the detector that is given:

- Thresholds let nearly everything pass (:class:`.Threshold`), and suppression
  is an operator of the graph (:func:`.suppress`).
- What Python computes from the number of boxes, which another image has
  another of, is computed without it (:class:`Tracing`).
- Loops over boxes are operations on all of them (:func:`vote`).
"""

import copy
import io
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from mmdet.structures.bbox import bbox_overlaps
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmkd.errors import ExportError

from .blank import whole_image
from .graph_ops import OPSET, Above, Threshold, suppress, symbols
from .pixels import flips, mean_std, pad_value

INPUTS = ('image', 'size')
OUTPUTS = ('boxes', 'scores', 'labels')
REMEDY = (
    'The page "Export the student" lists the detectors that export; MMDeploy '
    'knows more of them.'
)
THRESHOLDS = ('score_thr', 'conf_thr', 'min_bbox_size')
"""Options of heads that they compare the values of boxes with."""


class DetectorGraph(nn.Module):
    """A detector as a function of tensors, to be traced.

    Args:
        model: The detector.
        padding: The value, in pixels, that a pipeline pads images with before
            they are normalised; the detector then takes the padding for a
            part of the image. None leaves padding to the data preprocessor,
            after normalisation, of which the detector knows.
    """

    def __init__(self, model: Any, padding: float | None = None) -> None:
        super().__init__()
        self.model = model
        self.padding = padding
        self.mean, self.std = (
            value.view(-1, 1, 1) for value in mean_std(model.data_preprocessor)
        )
        self.flips = flips(model.data_preprocessor)
        self.blank = pad_value(model.data_preprocessor)

    def forward(self, image: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        """Detect.

        Args:
            image: (H, W, 3), BGR, with a picture in its upper left corner.
            size: The height and the width of the picture.

        Returns:
            Boxes (N, 4), xyxy in pixels of the image, scores (N), labels (N).
        """
        shape = (int(image.shape[0]), int(image.shape[1]))
        rows, columns = (torch.arange(side) for side in shape)
        inside = (rows[:, None] < size[0]) & (columns < size[1])
        pixels = image.permute(2, 0, 1).float()
        if self.padding is not None:
            pixels = torch.where(inside, pixels, torch.tensor(self.padding))
        if self.flips:
            pixels = pixels.flip(0)
        pixels = (pixels - self.mean) / self.std
        if self.padding is None:
            pixels = torch.where(inside, pixels, torch.tensor(self.blank))
        sample = whole_image(shape)
        if self.padding is None:
            # A copy, as `set_metainfo` makes one, would be a constant.
            sample.set_field(
                (size[0], size[1]), 'img_shape', field_type='metainfo'
            )
        with Tracing(), not_for_onnx():
            (found,) = self.model.predict(
                pixels[None], [sample], rescale=False
            )
        boxes = found.pred_instances
        return boxes.bboxes, boxes.scores, boxes.labels


def not_for_onnx() -> Any:
    """Hide from MMDetection what it is traced for.

    It has branches for the exporter of its version 2, which import modules
    that are gone.
    """
    return patch.object(torch.onnx, 'is_in_onnx_export', lambda: False)


def detector_graph(
    model: Any, shape: tuple[int, int], padding: float | None = None
) -> bytes:
    """Return a detector as an ONNX model for images of one size.

    Args:
        model: The detector, on the CPU; it is not changed.
        shape: (H, W) of the images.
        padding: See :class:`DetectorGraph`.

    Raises:
        ExportError: If the detector cannot be traced, or has operators that
            ONNX lacks; the message says which.
    """
    graph = DetectorGraph(traceable(model), padding).eval()
    noise = torch.Generator().manual_seed(0)
    image = torch.randint(256, (*shape, 3), generator=noise, dtype=torch.uint8)
    # Smaller than the image, so that the padding is part of the trace.
    size = torch.tensor([side * 3 // 4 for side in shape])
    file: Any = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings(), symbols():
        warnings.simplefilter('ignore')  # of tracing, and of the exporter
        try:
            with hushed():
                torch.onnx.export(
                    graph,
                    (image, size),
                    file,
                    dynamo=False,
                    opset_version=OPSET,
                    input_names=INPUTS,
                    output_names=OUTPUTS,
                    dynamic_axes={name: {0: 'boxes'} for name in OUTPUTS},
                )
        except Exception as error:  # any detector, any reason
            raise ExportError(
                f'a {type(model).__name__} cannot be traced: '
                f'{type(error).__name__}: {first_line(error)} {REMEDY}'
            ) from error
    return file.getvalue()


@contextmanager
def hushed() -> Iterator[None]:
    """Keep the exporter, which is not Python's, from printing the graph."""
    sys.stdout.flush()
    kept, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(null)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ['']
    return f'{lines[0][:300].rstrip(".")}.'


# ----------------------------------------------------------------- preparing


def traceable(model: Any) -> Any:
    """Return a copy whose heads suppress and compare as a graph does."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, value in vars(module).items():
            if name != 'train_cfg' and name[:1] != '_':
                adapt(value)
        if hasattr(module, 'score_voting'):
            module.score_voting = vote
    roi_head: Any = getattr(model, 'roi_head', None)
    if getattr(roi_head, 'mask_head', None) is not None:
        roi_head.mask_head = None  # the graph has boxes alone
    return model


def adapt(options: Any) -> None:
    """Adapt options of post-processing, in place."""
    for each in dicts(options):
        for key in each.keys() & set(THRESHOLDS):
            if isinstance(each[key], int | float):
                each[key] = Threshold(each[key])
        nms, most = each.get('nms'), each.get('max_per_img') or 0
        if isinstance(nms, dict) and most > 0:
            # Suppression ends when it has as many as are kept.
            nms.setdefault('max_num', most)
        kind = each.get('type', 'nms')
        if kind == 'nms' and 'type' in each and 'iou_thr' in each:
            each['iou_threshold'] = each.pop('iou_thr')  # its former name
        if 'iou_threshold' not in each and kind != 'soft_nms':
            continue
        if kind == 'soft_nms':
            raise ExportError(
                'the detector suppresses boxes by soft_nms, which ONNX has no '
                'operator for. Set the `nms` of its test_cfg to dict(type='
                "'nms', iou_threshold=0.5), and evaluate it so."
            )
        if kind == 'nms':
            # mmcv would take the classes of many boxes one by one
            each.update(type=suppress, split_thr=sys.maxsize)


def dicts(value: Any) -> Iterator[dict]:
    """All dicts in nested dicts and lists."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from dicts(each)


def vote(
    dets: Tensor,
    labels: Tensor,
    boxes: Tensor,
    scores: Tensor,
    score_thr: float,
) -> tuple[Tensor, Tensor]:
    """Take the place of PAA's ``score_voting``, which loops over boxes.

    Args:
        dets: (N, 5), the boxes that are kept, with their scores.
        labels: (N) their labels.
        boxes: (M, 4), all boxes.
        scores: (M, K + 1), their scores by class.
        score_thr: Boxes whose scores are not above it have no vote.
    """
    overlaps = bbox_overlaps(dets[:, :4], boxes)
    theirs = scores.t()[labels]
    votes = torch.exp(-((1 - overlaps) ** 2) / 0.025) * theirs
    votes = votes * ((overlaps > 0.01) & (theirs > score_thr))
    voted = votes @ boxes / votes.sum(1, keepdim=True)
    return torch.cat([voted, dets[:, 4:]], dim=1), labels


# ------------------------------------------------------------------- tracing


class Tracing(TorchFunctionMode):
    """Traces what depends on the number of boxes so that any number fits."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, '__name__', '')
        kwargs = kwargs or {}
        if is_view(args) and name[:1] != '_' and name[-1:] == '_':
            # The exporter forgets what is done to a view in place.
            whole, index = args[0].view_of
            name = name[:-1]
            changed = traced(name, getattr(Tensor, name), args, kwargs)
            whole[index] = changed
            return changed
        return traced(name, func, args, kwargs)


def traced(
    name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    rule = RULES.get(name.strip('_'))
    result = None if rule is None else rule(name, func, *args, **kwargs)
    return func(*args, **kwargs) if result is None else result


def is_view(args: Sequence[Any]) -> bool:
    return bool(args) and hasattr(args[0], 'view_of')


def compare(name: str, func: Any, values: Any, other: Any) -> Any:
    if isinstance(other, Threshold):
        return Above.apply(values, float(other), 'ge' in name)
    return None


def count(name: str, func: Any, values: Tensor) -> Any:
    """No tensor counts as empty."""
    return max(int(func(values)), 1)


def maximum(
    name: str, func: Any, values: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """The maximum of no boxes is no error."""
    if args or kwargs or not values.is_floating_point():
        return None
    return func(torch.cat([values.flatten(), values.new_full((1,), -1e9)]))


def split(
    name: str, func: Any, values: Tensor, sizes: Any, dim: int = 0
) -> Any:
    """The only image has all the boxes, however many there are."""
    if isinstance(sizes, list | tuple) and len(sizes) == 1:
        return (values,)
    return None


def clamp(
    name: str, func: Any, values: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Numbers beside a size that is not known before become tensors."""
    limits = {**dict(zip(('min', 'max'), args, strict=False)), **kwargs}
    limits = {key: limit for key, limit in limits.items() if limit is not None}
    if not has_tensor([*limits.values()]):
        return None
    limits = {
        key: torch.as_tensor(limit).to(values) for key, limit in limits.items()
    }
    return func(values, **limits)


def ones(
    name: str, func: Any, values: Tensor, *size: Any, **kwargs: Any
) -> Any:
    """The kernel of a convolution, which TOOD makes, is a constant."""
    if len(size) != 4 or kwargs:
        return None
    kernel = np.ones([int(side) for side in size])
    return torch.tensor(kernel, dtype=values.dtype)


def new_tensor(name: str, func: Any, *args: Any, **kwargs: Any) -> Any:
    """The size of the picture does not become a constant."""
    data = args[-1]
    if not has_tensor(data):
        return None
    return stacked(data).to(args[0]) if len(args) > 1 else stacked(data)


def stacked(data: Any) -> Tensor:
    if isinstance(data, list | tuple):
        return torch.stack([stacked(each) for each in data])
    return torch.as_tensor(data)


def has_tensor(data: Any) -> bool:
    """Whether nested lists have a tensor among their numbers."""
    if isinstance(data, list | tuple):
        return any(isinstance(x, Tensor) or has_tensor(x) for x in data)
    return False


def log2(name: str, func: Any, values: Tensor) -> Any:
    """Rounding does not decide on the level of a RoI.

    ONNX has the natural logarithm, by which that of 4 is not quite 2.
    """
    return (values.double().log() / math.log(2)).to(values.dtype)


def get_item(name: str, func: Any, values: Tensor, index: Any) -> Any:
    found = func(values, index)
    if name == '__getitem__' and found._base is not None:
        found.view_of = values, index
    return found


def reshape(name: str, func: Any, values: Tensor, *shape: Any) -> Any:
    """Onnxruntime cannot tell how much is left over for -1 of nothing."""
    sizes = shape[0] if isinstance(shape[0], list | tuple) else shape
    left = [type(size) is int and size == -1 for size in sizes]
    if not any(left) or not has_tensor(sizes):
        return None
    result = func(values, *shape)
    known = [int(side) for side in result.shape]
    return func(
        values,
        [known[i] if left[i] else size for i, size in enumerate(sizes)],
    )


RULES: dict[str, Any] = dict(
    gt=compare,
    ge=compare,
    numel=count,
    max=maximum,
    split=split,
    clamp=clamp,
    new_ones=ones,
    new_tensor=new_tensor,
    tensor=new_tensor,
    log2=log2,
    getitem=get_item,
    reshape=reshape,
    view=reshape,
)
"""What is traced in another way, by the name of the function."""
