"""The images of one training step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmdet.structures import DetDataSample
from mmdet.structures.bbox import BaseBoxes
from mmengine.structures import BaseDataElement
from torch import Tensor

PLAIN = (int, float, str, bool, tuple, type(None))
"""Most values of meta data, which nobody can change."""


@dataclass(frozen=True)
class Batch:
    """What the student gets in one step, and when that is."""

    inputs: Tensor
    """(B, 3, H, W), in the student's normalisation, padded to one size."""
    data_samples: Sequence[DetDataSample]
    """The ground truth and the meta data of each image."""
    unlabelled: 'Batch | None' = None
    """Images without ground truth, for methods that need no labels."""
    weak: 'Batch | None' = None
    """Of unlabelled images: the same ones as the teacher sees them, changed
    less. None for labelled images, which teacher and student see alike."""
    step: int = 0
    """The number of steps that the distiller has taken before this one."""
    epoch: int = 0
    """The number of epochs that are complete; 0 where none are counted."""

    def copies(self) -> list[DetDataSample]:
        """Return the data samples for a loss, which may change them.

        Stock losses do: RTMDet-Ins turns the masks of its objects into
        tensors, and Fast R-CNN renames its proposals.
        """
        return [copied(sample) for sample in self.data_samples]


def copied(value: Any) -> Any:
    """Copy a data sample, with its fields and their tensors.

    Arrays are shared, such as those of masks, which may be large: no stock
    loss writes into them.
    """
    if isinstance(value, BaseDataElement):
        copy = object.__new__(type(value))
        fields = vars(copy)  # past the checks of __setattr__
        for name, part in vars(value).items():
            plain = type(part) in PLAIN
            fields[name] = part if plain else copied(part)
        return copy
    if isinstance(value, Tensor | BaseBoxes):
        return value.clone()
    if isinstance(value, set):  # the names of an element's fields
        return set(value)
    if isinstance(value, list):
        return [copied(item) for item in value]
    return value
