"""A blank image, and what a detector makes of it before training."""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from mmdet.structures import DetDataSample
from torch import nn

from .pixels import mean_std
from .record import StepRecord

PROBE_SIZE = 320
"""The side of the test images; SSD needs about 300."""


def probe_sample() -> DetDataSample:
    """Return the meta data of a test image."""
    return whole_image((PROBE_SIZE, PROBE_SIZE))


def whole_image(shape: tuple[int, int]) -> DetDataSample:
    """Return the meta data of an image that is neither resized nor padded."""
    return DetDataSample(
        metainfo=dict(
            img_id=0,
            img_shape=shape,
            ori_shape=shape,
            pad_shape=shape,
            batch_input_shape=shape,
            scale_factor=(1.0, 1.0),
            border=(0.0, 0.0, 0.0, 0.0),  # which CenterNet takes away
        )
    )


class _Found(Exception):
    """Ends a pass when its first layer is reached."""


@torch.no_grad()
def image_channels(model: Any) -> int:
    """Return how many channels the images have that a detector reads.

    The first layer with weights tells. If pixels are rearranged in front of it
    (YOLOX's Focus), it has a multiple of them. Where none is reached, it is
    as many as the data preprocessor has means, or else 3.
    """
    means = len(mean_std(getattr(model, 'data_preprocessor', None))[0])
    probe = max(means, 3)
    size = (probe, PROBE_SIZE, PROBE_SIZE)
    backbone = getattr(model, 'backbone', None) or nn.Identity()
    device = next(model.parameters()).device
    found: list[int] = []

    def note(layer: Any, inputs: Any) -> None:
        width = getattr(layer, 'in_channels', None)
        multiple = inputs[0].shape[1] // probe if inputs else 0
        if isinstance(width, int) and multiple:
            found.append(width // multiple)
        raise _Found

    handles = [
        module.register_forward_pre_hook(note)
        for module in backbone.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    try:
        with suppress(Exception):  # any backbone, any reason
            backbone(torch.zeros(1, *size, device=device))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else (means if means > 1 else 3)


def blank_pass(
    model: nn.Module,
    paths: Sequence[str],
    device: torch.device,
    *,
    as_in_training: bool = False,
) -> StepRecord:
    """Record a detector's forward pass on one blank image.

    It runs in eval mode and leaves buffers and modes as they were. A
    detector that fails midway still gives what it has produced; what is
    missing is reported where it is read.

    Args:
        model: The detector.
        paths: The paths to tap.
        device: The device of the detector.
        as_in_training: Run in the mode that the detector is in, and with
            gradients. Batch norms then change their buffers.
    """
    size = (1, image_channels(model), PROBE_SIZE, PROBE_SIZE)
    image = torch.linspace(-1, 1, math.prod(size), device=device).view(size)
    record = StepRecord(model, paths)
    modes = [(module, module.training) for module in model.modules()]
    if not as_in_training:
        model.eval()
    try:
        with record.recording(), torch.set_grad_enabled(as_in_training):
            model(image, [probe_sample()], mode='tensor')
    except Exception as error:  # any detector, any reason: see docstring
        record.note = f' (its test pass ended with {error!r})'
    finally:
        for module, mode in modes:
            module.training = mode
    return record
