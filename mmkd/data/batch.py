"""The images of one training step."""

from collections.abc import Sequence
from dataclasses import dataclass

from mmdet.structures import DetDataSample
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What the student gets in one step, and when that is."""

    inputs: Tensor
    """(B, 3, H, W), in the student's normalisation, padded to one size."""
    data_samples: Sequence[DetDataSample]
    """The ground truth and the meta data of each image."""
    unlabelled: 'Batch | None' = None
    """Images without ground truth, for methods that need no labels."""
    step: int = 0
    """The number of steps that the distiller has taken before this one."""
    epoch: int = 0
    """The number of epochs that are complete; 0 where none are counted."""
