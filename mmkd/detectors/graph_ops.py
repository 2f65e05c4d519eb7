"""Operators of mmcv in ONNX's words, and those that choose boxes.

PyTorch's exporter asks an autograd function for its ``symbolic``. Those that
mmcv brings are of older opsets, or of operators that onnxruntime lacks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmcv.ops.deform_conv import DeformConv2dFunction
from mmcv.ops.modulated_deform_conv import ModulatedDeformConv2dFunction
from mmcv.ops.nms import NMSop
from mmcv.ops.roi_align import RoIAlignFunction
from torch import Tensor
from torch.autograd import Function
from torch.nn.modules.utils import _pair

from mmkd.errors import ExportError

OPSET = 19
"""The first one with deformable convolution."""
ALL = 2**62
"""More boxes than there can be."""
FEW = 1000
"""The number of boxes that a suppression keeps while it is traced."""


class Threshold(float):
    """A threshold that nearly all values pass while they are traced.

    The traced pass is then the fullest there is, so that no branch of the code
    is taken, and no limit on a number of boxes is left out, for want of boxes.
    The graph compares as usual. The last value does not pass: "if not all
    have passed, then remove some" is part of the graph, too.
    """


class Above(Function):
    """Compares with a :class:`Threshold`."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, threshold: float, equal: bool
    ) -> Tensor:
        number = values.numel()
        return torch.arange(number).reshape(values.shape) < number - 1

    @staticmethod
    def symbolic(g: Any, values: Any, threshold: float, equal: bool) -> Any:
        name = 'GreaterOrEqual' if equal else 'Greater'
        return g.op(name, values, constant(g, threshold))


class NonMaxSuppression(Function):
    """Suppresses in the graph; the traced pass keeps the first boxes."""

    @staticmethod
    def forward(
        ctx: Any,
        boxes: Tensor,
        scores: Tensor,
        iou_threshold: float,
        most: int,
    ) -> Tensor:
        return torch.arange(min(int(boxes.shape[0]), most, FEW))

    @staticmethod
    def symbolic(
        g: Any, boxes: Any, scores: Any, iou_threshold: float, most: int
    ) -> Any:
        found = g.op(
            'NonMaxSuppression',
            g.op('Unsqueeze', boxes, constant(g, [0])),
            g.op('Unsqueeze', scores, constant(g, [0, 1])),
            constant(g, [most]),
            constant(g, [iou_threshold]),
        )
        return g.op('Gather', found, constant(g, 2), axis_i=1)


def suppress(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    offset: int = 0,
    score_threshold: float = 0,
    max_num: int = -1,
) -> tuple[Tensor, Tensor]:
    """Take the place of ``mmcv.ops.nms`` in a graph, with its arguments."""
    if score_threshold > 0:
        kept = scores > Threshold(score_threshold)
        dets, inds = suppress(
            boxes[kept], scores[kept], iou_threshold, offset, 0, max_num
        )
        return dets, kept.nonzero()[:, 0][inds]
    widened = boxes + boxes.new_tensor([0, 0, offset, offset])
    most = max_num if max_num > 0 else ALL
    inds = NonMaxSuppression.apply(widened, scores, float(iou_threshold), most)
    return torch.cat([boxes[inds], scores[inds][:, None]], dim=1), inds


def constant(g: Any, value: Any) -> Any:
    return g.op('Constant', value_t=torch.tensor(value))


def _nms(
    g: Any,
    boxes: Any,
    scores: Any,
    iou_threshold: float,
    offset: int,
    score_threshold: float,
    max_num: int,
) -> Any:
    if score_threshold > 0 or max_num > 0:
        raise ExportError('mmcv.ops.nms with a threshold or a limit')
    widened = g.op('Add', boxes, constant(g, [0.0, 0.0, offset, offset]))
    return NonMaxSuppression.symbolic(g, widened, scores, iou_threshold, ALL)


def _roi_align(
    g: Any,
    features: Any,
    rois: Any,
    size: Any,
    scale: float,
    ratio: int,
    mode: str,
    aligned: bool,
) -> Any:
    if mode != 'avg':
        raise ExportError('RoIAlign that takes the maximum')
    height, width = _pair(size)
    image = g.op('Gather', rois, constant(g, 0), axis_i=1)
    return g.op(
        'RoiAlign',
        features,
        g.op('Gather', rois, constant(g, [1, 2, 3, 4]), axis_i=1),
        g.op('Cast', image, to_i=torch.onnx.TensorProtoDataType.INT64),
        output_height_i=height,
        output_width_i=width,
        spatial_scale_f=float(scale),
        sampling_ratio_i=max(ratio, 0),
        mode_s='avg',
        coordinate_transformation_mode_s=(
            'half_pixel' if aligned else 'output_half_pixel'
        ),
    )


def _deform_conv(
    g: Any, x: Any, offset: Any, weight: Any, *options: Any
) -> Any:
    return _convolve(g, x, offset, weight, options[:5], ())


def _modulated_deform_conv(
    g: Any, x: Any, offset: Any, mask: Any, weight: Any, bias: Any, *args: Any
) -> Any:
    return _convolve(g, x, offset, weight, args[:5], (bias, mask))


def _convolve(
    g: Any, x: Any, offset: Any, weight: Any, options: Any, more: Any
) -> Any:
    stride, padding, dilation, groups, offset_groups = options
    if not isinstance(groups, int):
        # TOOD computes it: each channel is a group, with a kernel of its own.
        groups = offset_groups = weight.type().sizes()[0]
    return g.op(
        'DeformConv',
        *(x, weight, offset, *more),
        strides_i=_pair(stride),
        pads_i=[*_pair(padding), *_pair(padding)],
        dilations_i=_pair(dilation),
        group_i=groups,
        offset_group_i=offset_groups,
    )


SYMBOLS: dict[Any, Callable[..., Any]] = {
    NMSop: _nms,
    RoIAlignFunction: _roi_align,
    DeformConv2dFunction: _deform_conv,
    ModulatedDeformConv2dFunction: _modulated_deform_conv,
}


@contextmanager
def symbols() -> Iterator[None]:
    """Give mmcv's functions their ``symbolic`` for a while."""
    former = {function: vars(function).get('symbolic') for function in SYMBOLS}
    try:
        for function, symbolic in SYMBOLS.items():
            function.symbolic = staticmethod(symbolic)
        yield
    finally:
        for function, symbolic in former.items():
            if symbolic is None:
                del function.symbolic
            else:
                function.symbolic = symbolic
