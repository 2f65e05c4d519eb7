"""A blank image, and what a detector makes of it before training."""

from collections.abc import Sequence

import torch
from mmdet.structures import DetDataSample
from torch import nn

from .record import StepRecord

PROBE_SIZE = 320
"""The side of the test images; SSD needs about 300."""


def probe_sample() -> DetDataSample:
    """Return the meta data of a test image."""
    size = (PROBE_SIZE, PROBE_SIZE)
    return DetDataSample(
        metainfo=dict(
            img_id=0,
            img_shape=size,
            ori_shape=size,
            pad_shape=size,
            batch_input_shape=size,
            scale_factor=(1.0, 1.0),
        )
    )


@torch.no_grad()
def blank_pass(
    model: nn.Module, paths: Sequence[str], device: torch.device
) -> StepRecord:
    """Record a detector's forward pass on one blank image.

    It runs in eval mode and leaves buffers and modes as they were. A
    detector that fails midway still gives what it has produced; what is
    missing is reported where it is read.
    """
    image = torch.linspace(-1, 1, 3 * PROBE_SIZE**2, device=device)
    record = StepRecord(model, paths)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with record.recording():
            image = image.view(1, 3, PROBE_SIZE, PROBE_SIZE)
            model(image, [probe_sample()], mode='tensor')
    except Exception as error:  # any detector, any reason: see docstring
        record.note = f' (its test pass ended with {error!r})'
    finally:
        for module, mode in modes:
            module.training = mode
    return record
