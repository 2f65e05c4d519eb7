"""Read boxes out of the outputs of the usual ONNX files.

A decoder takes the outputs of one image by name, without the dimension of the
batch, and returns candidates: boxes (N, 4), xyxy in pixels of the input,
scores (N, K) of each class or (N,) of one, and in the second case labels (N,).
What all files have in common (the threshold of the score, suppression, the
limit on the number of boxes) follows in :func:`chosen`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from mmcv.ops import batched_nms

from mmkd.errors import ConfigError

from .detections import WHERE, Found
from .functions import find_function

Outputs = Mapping[str, np.ndarray]
"""The outputs of one image by their names, without a batch's dimension."""
Shapes = Mapping[str, Sequence[int]]
"""The shapes of these outputs."""
MOST = 5000
"""As many candidates, those of the highest scores, enter the suppression."""


class Candidates(NamedTuple):
    """What is read of an image, before anything is left out."""

    boxes: np.ndarray
    """(N, 4), xyxy in pixels of the input."""
    scores: np.ndarray
    """(N, K) for each class, or (N,)."""
    labels: np.ndarray | None = None
    """(N,) where there is one score for each box."""


class Setting(NamedTuple):
    """What a decoder is told about the file."""

    classes: int
    """The number of classes."""
    size: tuple[int, int]
    """Height and width of the input."""


class Decoder(NamedTuple):
    """How the outputs of a kind of file are recognised and read."""

    read: Callable[[Outputs, Setting], Candidates]
    fits: Callable[[Shapes, Setting], bool]
    """Tells by the shapes of one image's outputs."""
    suppress: bool
    """Whether overlapping boxes are yet to be suppressed."""
    shapes: str
    """The outputs in words, for messages."""


# -------------------------------------------------------------------- readers


def _mmdeploy(outputs: Outputs, setting: Setting) -> Candidates:
    boxes = _by_rank(outputs, 2, 5)
    labels = next(v for v in outputs.values() if v.ndim == 1)
    return Candidates(boxes[:, :4], boxes[:, 4], labels)


def _yolo(outputs: Outputs, setting: Setting) -> Candidates:
    values = _by_rank(outputs, 2, 4 + setting.classes, axis=0).T
    return Candidates(_corners(values[:, :4]), values[:, 4:])


def _yolov5(outputs: Outputs, setting: Setting) -> Candidates:
    values = _by_rank(outputs, 2, 5 + setting.classes)
    return Candidates(_corners(values[:, :4]), values[:, 4:5] * values[:, 5:])


def _end_to_end(outputs: Outputs, setting: Setting) -> Candidates:
    values = _by_rank(outputs, 2, 6)
    return Candidates(values[:, :4], values[:, 4], values[:, 5])


def _detr(outputs: Outputs, setting: Setting) -> Candidates:
    named = {n: v for n, v in outputs.items() if 'box' in n.lower()}
    boxes = _by_rank(named or outputs, 2, 4)  # logits of 4 classes look alike
    logits = next(
        value
        for value in outputs.values()
        if value.ndim == 2 and value is not boxes
    ).astype(np.float64)
    height, width = setting.size
    boxes = _corners(boxes) * [width, height, width, height]
    if logits.shape[1] == setting.classes:
        return Candidates(boxes, 1 / (1 + np.exp(-logits)))
    powers = np.exp(logits - logits.max(1, keepdims=True))
    scores = (powers / powers.sum(1, keepdims=True))[:, :-1]
    labels = scores.argmax(1)
    return Candidates(boxes, scores.max(1), labels)


def _nanodet(outputs: Outputs, setting: Setting) -> Candidates:
    boxes, scores = [], []
    height, width = setting.size
    by_length: dict[int, list[np.ndarray]] = {}
    for value in outputs.values():
        by_length.setdefault(len(value), []).append(value)
    for count, pair in sorted(by_length.items(), reverse=True):
        cls, reg = sorted(pair, key=lambda v: v.shape[1] != setting.classes)
        stride = round((height * width / count) ** 0.5)
        bins = reg.reshape(count, 4, -1).astype(np.float64)
        powers = np.exp(bins - bins.max(-1, keepdims=True))
        steps = powers / powers.sum(-1, keepdims=True)
        sides = steps @ np.arange(bins.shape[-1]) * stride
        columns = -(-width // stride)
        place = np.arange(count)
        centre = np.stack([place % columns, place // columns], 1) * stride
        centre = centre + (stride - 1) / 2
        boxes.append(np.hstack([centre - sides[:, :2], centre + sides[:, 2:]]))
        scores.append(cls)
    return Candidates(np.vstack(boxes), np.vstack(scores))


def _mmkd(outputs: Outputs, setting: Setting) -> Candidates:
    return Candidates(outputs['boxes'], outputs['scores'], outputs['labels'])


# ------------------------------------------------------------------ recognised


def _shaped(*expected: Any) -> Callable[..., bool]:
    """Return whether there is an output of each shape; None is any length."""

    def fits(shapes: Shapes, setting: Setting) -> bool:
        wanted = [
            [s(setting) if callable(s) else s for s in shape]
            for shape in expected
        ]
        left = list(shapes.values())
        for shape in wanted:
            found = next((s for s in left if _agrees(s, shape)), None)
            if found is None:
                return False
            left.remove(found)
        return not left or len(expected) == 1

    return fits


def _agrees(shape: Sequence[Any], wanted: Sequence[Any]) -> bool:
    return len(shape) == len(wanted) and all(
        w is None or s == w for s, w in zip(shape, wanted, strict=True)
    )


def _is_nanodet(shapes: Shapes, setting: Setting) -> bool:
    widths: dict[int, list[int]] = {}
    for shape in shapes.values():
        if len(shape) != 2:
            return False
        widths.setdefault(shape[0], []).append(shape[1])
    # A level has scores and at least two bins for each of the four sides.
    sides = [
        sum(pair) - setting.classes
        for pair in widths.values()
        if len(pair) == 2 and setting.classes in pair
    ]
    return len(sides) == len(widths) > 1 and all(
        side % 4 == 0 and side > 4 and side != setting.classes
        for side in sides
    )


def _is_detr(shapes: Shapes, setting: Setting) -> bool:
    counts = setting.classes, setting.classes + 1
    return any(_shaped((None, 4), (None, n))(shapes, setting) for n in counts)


def _never(shapes: Shapes, setting: Setting) -> bool:
    return False  # it is recognised by what the file says of itself


DECODERS = {
    'mmdeploy': Decoder(
        _mmdeploy,
        _shaped((None, 5), (None,)),
        False,
        'dets (B, N, 5) and labels (B, N)',
    ),
    'yolo': Decoder(
        _yolo,
        _shaped((lambda s: 4 + s.classes, None)),
        True,
        '(B, 4 + K, N)',
    ),
    'yolov5': Decoder(
        _yolov5,
        _shaped((None, lambda s: 5 + s.classes)),
        True,
        '(B, N, 5 + K)',
    ),
    'end_to_end': Decoder(_end_to_end, _shaped((None, 6)), False, '(B, N, 6)'),
    'detr': Decoder(
        _detr,
        _is_detr,
        False,
        'boxes (B, N, 4) and logits (B, N, K or K + 1)',
    ),
    'nanodet': Decoder(
        _nanodet,
        _is_nanodet,
        True,
        'for each stride, scores (B, n, K) and logits of sides (B, n, 4 bins)',
    ),
    'mmkd': Decoder(_mmkd, _never, False, 'what `mmkd export` writes'),
}


def find_decoder(
    name: str, shapes: Shapes, setting: Setting, file: str
) -> Decoder:
    """Return the decoder of a file.

    Args:
        name: Its name, ``'auto'``, or ``'module:function'``.
        shapes: The shapes of the outputs for one image, without the dimension
            of the batch.
        setting: The number of classes, and the size of the input.
        file: The file, for messages.

    Raises:
        ConfigError: If there is none, more than one fits, or the one that was
            chosen does not.
    """
    if ':' in name:
        read = find_function(name, f'{WHERE}.decoder')
        return Decoder(read, lambda *_: True, True, 'any')
    if name != 'auto' and name not in DECODERS:
        raise ConfigError(
            f'{WHERE}.decoder must be one of auto, {", ".join(DECODERS)} or '
            f'"module:function", got {name!r}.'
        )
    names = DECODERS if name == 'auto' else [name]
    fitting = [n for n in names if DECODERS[n].fits(shapes, setting)]
    if name == 'mmkd' or len(fitting) == 1:
        return DECODERS[fitting[0] if fitting else name]
    given = ', '.join(
        f'{n} (B, {", ".join(map(str, shape))})' for n, shape in shapes.items()
    )
    known = '; '.join(f'{n}: {d.shapes}' for n, d in DECODERS.items())
    what = (
        f'fits {" and ".join(fitting)}'
        if fitting
        else 'fits no decoder that is known'
        if name == 'auto'
        else f'does not fit decoder={name!r}'
    )
    raise ConfigError(
        f'{WHERE}: {file} has the outputs {given} and the teacher '
        f'{setting.classes} classes (K), which {what}. Set `decoder` to one '
        f'of these, give the right `classes`, or write a function of your own '
        f'(decoder="module:function"). Decoders: {known}.'
    )


# ---------------------------------------------------------------------- chosen


def chosen(
    candidates: Candidates,
    *,
    score_thr: float,
    nms_iou: float | None,
    max_per_image: int,
) -> Found:
    """Return the detections among the candidates, by falling score.

    Args:
        candidates: Boxes with a score for each class, or with one.
        score_thr: Those of a lower score are left out.
        nms_iou: Of boxes of one class that overlap by a higher IoU, only that
            of the highest score stays; None keeps all.
        max_per_image: At most so many stay.
    """
    boxes, scores, labels = candidates
    boxes = np.asarray(boxes, np.float32)
    scores = np.asarray(scores, np.float32)
    if labels is None:
        rows, labels = np.nonzero(scores >= score_thr)
        boxes, scores = boxes[rows], scores[rows, labels]
    else:
        kept = scores >= score_thr
        boxes, scores = boxes[kept], scores[kept]
        labels = np.asarray(labels)[kept]
    order = np.argsort(-scores, kind='stable')[:MOST]
    found = Found(
        boxes[order], scores[order], np.asarray(labels)[order].astype(np.int64)
    )
    if nms_iou is not None and len(order):
        found = found.at(_suppressed(found, nms_iou))
    return found.at(np.arange(len(found.scores))[:max_per_image])


def _suppressed(found: Found, iou: float) -> np.ndarray:
    boxes, scores, labels = (
        torch.from_numpy(np.ascontiguousarray(part)) for part in found
    )
    options = dict(type='nms', iou_threshold=iou)
    return batched_nms(boxes, scores, labels, options)[1].numpy()


def _corners(boxes: np.ndarray) -> np.ndarray:
    """Return xyxy for (N, 4), centre x and y, width and height."""
    half = boxes[:, 2:] / 2
    return np.hstack([boxes[:, :2] - half, boxes[:, :2] + half])


def _by_rank(
    outputs: Outputs, rank: int, length: int, axis: int = -1
) -> np.ndarray:
    return next(
        value
        for value in outputs.values()
        if value.ndim == rank and value.shape[axis] == length
    )
