"""A labelled data set without labels, for trainings that have none."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch.utils.data import Dataset

SIZE = 32


class BlankImages(Dataset):
    """Blank images, as many as there are unlabelled ones.

    They take the place of labelled images where the student learns from
    unlabelled ones alone, so that an epoch is one pass over these. No loss is
    computed on them.

    Args:
        number: How many there are.
        classes: The names of the student's classes; None if unknown.
    """

    def __init__(self, number: int, classes: Sequence[str] | None) -> None:
        self.number = number
        self.metainfo = dict(classes=classes) if classes else {}

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, Any]:
        shape = (SIZE, SIZE)
        sample = DetDataSample(
            metainfo=dict(img_id=index, img_shape=shape, ori_shape=shape)
        )
        sample.gt_instances = InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)
        )
        return dict(
            inputs=torch.zeros(3, *shape, dtype=torch.uint8),
            data_samples=sample,
        )

    def update_skip_type_keys(self, keys: Iterable[str]) -> None:
        """Do nothing: hooks switch off transforms that are not here."""
