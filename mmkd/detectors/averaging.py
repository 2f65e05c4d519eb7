"""The mean of several detectors' predictions."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from mmdet.structures import DetDataSample
from torch import Tensor

from mmkd.errors import ConfigError

from .dense_checks import check_same_priors
from .facts import DenseFacts, DetectorFacts, read_facts, same_coder
from .passes import run_dense_head
from .record import replaced

CLASSES = 'the classes that only one knows'


def mean_of(values: Sequence[Any]) -> Any:
    """Return the mean of equally nested tensors; None where all are None.

    Raises:
        ConfigError: If shapes or structures differ.
    """
    first = values[0]
    if isinstance(first, list | tuple) and all(
        isinstance(each, list | tuple) and len(each) == len(first)
        for each in values
    ):
        return type(first)(map(mean_of, zip(*values, strict=True)))
    if all(each is None for each in values):
        return None
    shapes = [tuple(getattr(each, 'shape', ())) for each in values]
    if not isinstance(first, Tensor) or len(set(shapes)) > 1:
        raise ConfigError(
            "the heads' outputs cannot be averaged, they are of the shapes "
            f'{shapes}. Give detectors with equal heads.'
        )
    return torch.stack(list(values)).mean(0)


# ------------------------------------------------------- another class order


def class_order(
    first: Sequence[str], other: Sequence[str], device: torch.device
) -> Tensor | None:
    """Return the index of each class in the other's order, or None."""
    return _class_order(tuple(first), tuple(other), device)


@functools.lru_cache
def _class_order(
    first: tuple[str, ...], other: tuple[str, ...], device: torch.device
) -> Tensor | None:
    if first == other:
        return None
    return torch.tensor([other.index(name) for name in first], device=device)


def reorder_dense(facts: DenseFacts, raw: Any, order: Tensor | None) -> Any:
    """Return a dense head's output with reordered classes."""
    if order is None:
        return raw
    if hasattr(facts.head, 'num_attrib'):  # YOLOv3: box and object come first
        before, width = 5, facts.head.num_attrib
    else:
        before, width = 0, facts.head.cls_out_channels
    maps = [
        _columns(level.unflatten(1, (-1, width)), before, order).flatten(1, 2)
        for level in raw[0]
    ]
    return (maps, *raw[1:])


def reorder_rois(
    logits: Tensor, deltas: Tensor | None, order: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return a RoI head's output with reordered classes."""
    if order is None:
        return logits, deltas
    if deltas is not None and deltas.shape[1] > 4:
        deltas = deltas.unflatten(1, (-1, 4))[:, order].flatten(1)
    return _columns(logits[:, None], 0, order)[:, 0], deltas


def _columns(values: Tensor, before: int, order: Tensor) -> Tensor:
    """Return (N, A, c, ...) with the columns of classes reordered.

    ``before`` columns come first, and that of the background last, if there
    is one.
    """
    after = before + len(order)
    return torch.cat(
        [
            values[:, :, :before],
            values[:, :, before + order],
            values[:, :, after:],
        ],
        dim=2,
    )


# ------------------------------------------------------------------ agreement


def meaning(facts: DetectorFacts, classes: Sequence[str]) -> dict[str, Any]:
    """Return in words what the numbers of a detector's heads depend on.

    Two detectors can be averaged if these are equal.
    """
    found: dict[str, Any] = {CLASSES: set(classes)}
    for part in ('rpn_head', 'bbox_head'):
        head = getattr(facts.model, part, None)
        found[f'the {part}'] = type(head).__name__
        if hasattr(head, 'prior_generator'):
            for what, value in _dense_meaning(head).items():
                found[f'{what} of the {part}'] = value
    found['the number of RoI stages'] = len(facts.rois)
    for stage, roi in enumerate(facts.rois):
        for what, value in {
            'the classifier': 'sigmoid' if roi.sigmoid else 'softmax',
            'reg_class_agnostic': roi.class_agnostic,
            'the box coder': _Coder(roi.coder),
        }.items():
            found[f'{what} of RoI stage {stage}'] = value
    return found


def _dense_meaning(head: Any) -> dict[str, Any]:
    generator = head.prior_generator
    places = [(1, 1)] * generator.num_levels
    sigmoid = getattr(head, 'use_sigmoid_cls', True)
    activated = getattr(getattr(head, 'loss_cls', None), 'activated', False)
    return {
        'the classifier': 'sigmoid' if sigmoid else 'softmax',
        'the scores': 'probabilities' if activated else 'logits',
        'the strides': [tuple(stride) for stride in generator.strides],
        'the first priors': [
            [[round(x, 2) for x in prior] for prior in level.tolist()]
            for level in generator.grid_priors(places, device='cpu')
        ],
        'the box coder': _Coder(getattr(head, 'bbox_coder', None)),
        'reg_max': getattr(head, 'reg_max', None),
        'anchor_type': getattr(head, 'anchor_type', None),
    }


class _Coder:
    """A box coder that is equal to others that give the same deltas."""

    def __init__(self, coder: Any) -> None:
        self.coder = coder

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Coder) and same_coder(
            self.coder, other.coder
        )

    def __repr__(self) -> str:
        return f'{type(self.coder).__name__} {vars(self.coder)}'


# ------------------------------------------------------------------ inference


def detect_by_mean(members: Sequence[Any], data: Any) -> list[DetDataSample]:
    """Detect by the mean of the outputs of equal dense heads.

    Args:
        members: Detectors that :func:`check_averageable` accepts.
        data: A batch as the data loader gives it.
    """
    batches = [each.data_preprocessor(data) for each in members]
    maps = [
        member.extract_feat(batch['inputs'])
        for member, batch in zip(members, batches, strict=True)
    ]
    outputs = [
        run_dense_head(member, levels)
        for member, levels in zip(members, maps, strict=True)
    ]
    average = mean_of(outputs)
    first, samples = members[0], batches[0]['data_samples']
    with replaced(first.bbox_head, 'forward', lambda *_: average):
        results = first.bbox_head.predict(maps[0], samples, rescale=True)
    return first.add_pred_to_datasample(samples, results)


def check_averageable(members: Sequence[Any], where: str) -> None:
    """Check that detectors have the same dense head on the same priors.

    Raises:
        ConfigError: If they have not; the message says what differs.
    """
    first = read_facts(members[0])
    for member in members:
        facts = read_facts(member)
        differ = _difference(first, facts)
        if differ is None:
            assert first.dense is not None
            assert facts.dense is not None
            try:
                check_same_priors(
                    first.dense, facts.dense, where, centres=True
                )
            except ConfigError as error:
                differ = str(error)
        if differ is None and _padding(member) != _padding(members[0]):
            differ = 'their images are padded to different sizes'
        if differ is not None:
            raise ConfigError(
                f'{where} averages equal dense heads on the same priors, '
                f"these do not agree: {differ} Use fusion='boxes'."
            )


def _difference(first: DetectorFacts, other: DetectorFacts) -> str | None:
    heads = [getattr(f.model, 'bbox_head', None) for f in (first, other)]
    kinds = [type(head).__name__ for head in heads]
    if kinds[0] != kinds[1]:
        return f'{kinds[0]} and {kinds[1]}.'
    if first.dense is None or other.dense is None:
        return f'{kinds[0]} has no priors.'
    for name in ('cls_out_channels', 'use_sigmoid_cls', 'reg_max'):
        values = [getattr(head, name, None) for head in heads]
        if values[0] != values[1]:
            return f'{name} is {values[0]} and {values[1]}.'
    coders = first.dense.coder, other.dense.coder
    if coders[0] is not None and not same_coder(*coders):
        return 'their box coders differ.'
    anchors = [
        [a.tolist() for a in getattr(f.dense.generator, 'base_anchors', [])]
        for f in (first, other)
        if f.dense is not None
    ]
    return None if anchors[0] == anchors[1] else 'their anchors differ.'


def _padding(member: Any) -> Any:
    return getattr(member.data_preprocessor, 'pad_size_divisor', None)


def nms_threshold(model: Any) -> float:
    """Return the IoU threshold of a detector's own NMS, or 0 without one."""
    heads = (getattr(model, name, None) for name in ('roi_head', 'bbox_head'))
    head = next(filter(None, heads), None)
    options = getattr(head, 'test_cfg', None) or {}
    nms = options.get('nms') or {}
    if nms.get('type', 'nms') != 'nms':  # soft-NMS lowers scores instead
        return 0.0
    return nms.get('iou_threshold', options.get('iou_thr', 0.0))  # YOLACT
