"""What a teacher computes for test images, to compare it with itself."""

import contextlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.detectors.blank import PROBE_SIZE, image_channels, probe_sample
from mmkd.detectors.facts import box_heads
from mmkd.detectors.record import tensors_in

from .frozen import FrozenDetector, FrozenView

ROIS = ((8.0, 8.0, 200.0, 120.0), (90.0, 40.0, 310.0, 310.0))
"""The boxes in each test image, as xyxy."""


def probe(
    teacher: FrozenDetector, images: Sequence[int] = (0,)
) -> dict[str, list[Tensor]]:
    """Return everything that methods can read of a teacher for noise.

    A part that the detector does not have, or not in the form that methods
    read, is left out.

    Args:
        teacher: The teacher, whose cache is not used.
        images: The numbers of the images. Each has its own noise.

    Returns:
        The tensors of each part, by its name.
    """
    device = next(teacher.model.parameters()).device
    channels = image_channels(teacher.model)
    noise = [_noise(number, channels) for number in images]
    inputs = torch.stack(noise).to(device)
    samples = [probe_sample()] * len(images)
    view = FrozenView(teacher, Batch(inputs, samples))
    parts: dict[str, Any] = {'the feature maps': view.maps}
    with contextlib.suppress(Exception):
        parts['the RPN'] = view.rpn
    with contextlib.suppress(Exception):
        parts['the dense head'] = view.raw_dense
    rois = [(i, *box) for i in range(len(images)) for box in ROIS]
    sample: Any = SimpleNamespace(boxes=torch.tensor(rois, device=device))
    stages = [sample for _ in box_heads(teacher.model)]
    for stage, _ in enumerate(stages):
        with contextlib.suppress(Exception):
            parts[f'RoI stage {stage}'] = view.score_rois(sample, stage)[:2]
    student: Any = SimpleNamespace(model=teacher.model, rois=stages)
    for path in teacher.paths:
        with contextlib.suppress(Exception):
            parts[path] = view.features(path, student)
    return {name: list(tensors_in(part)) for name, part in parts.items()}


def _noise(seed: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(channels, PROBE_SIZE, PROBE_SIZE, generator=generator)


def difference(
    ours: dict[str, list[Tensor]], theirs: dict[str, list[Tensor]]
) -> tuple[float, str]:
    """Return the largest difference of two probes, and its part.

    The difference of a tensor is relative to its largest value. Parts or
    values that only one probe has, and values that are finite in only one,
    differ infinitely.
    """
    worst, where = 0.0, ''
    for part in dict.fromkeys((*ours, *theirs)):
        a, b = ours.get(part, []), theirs.get(part, [])
        share = _difference(a, b) if part in ours and part in theirs else None
        if share is None or share > worst:
            worst = torch.inf if share is None else share
            where = part
    return worst, where


def _difference(ours: list[Tensor], theirs: list[Tensor]) -> float | None:
    if [a.shape for a in ours] != [b.shape for b in theirs]:
        return None
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not b.numel():
            continue
        a, b = a.double(), b.double()
        share = (a - b).abs().max() / b.abs().max().clamp(min=1e-30)
        if not share.isfinite():
            return None
        worst = max(worst, share.item())
    return worst
