"""Show where detectors look, and where student and teacher disagree."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.teachers.view import FEATURES

from .evaluation import load_data, load_model
from .work_dir import WorkDir


@dataclass
class Attention:
    """Where two networks look: maps (H, W) that each sum to 1."""

    student: np.ndarray
    teacher: np.ndarray

    @property
    def elsewhere(self) -> float:
        """The share of attention that the networks do not have in common.

        It is half the sum of absolute differences, from 0 to 1.
        """
        return float(abs(self.student - self.teacher).sum() / 2)


def attend(
    run: WorkDir, teacher: Any, ids: Sequence[Any]
) -> dict[Any, Attention]:
    """Compare a distilled student's features with its teacher's.

    The attention of several teachers is their mean.

    Args:
        run: A run that distils.
        teacher: Its teachers, already built.
        ids: The images, by their ``img_id``.

    Returns:
        The comparison by ``img_id``; empty if no teacher gives features.
    """
    teachers = [
        each
        for each in (teacher.networks or teacher.each()).values()
        if FEATURES in each.gives
    ]
    if not teachers:
        return {}
    model, loader = load_model(run), load_data(run)
    dataset = loader.dataset
    numbers = {
        dataset.get_data_info(i)['img_id']: i for i in range(len(dataset))
    }
    found = {}
    for image in ids:
        batch = loader.collate_fn([dataset[numbers[image]]])
        with torch.no_grad():
            data = model.data_preprocessor(batch)
            inputs, samples = data['inputs'], data['data_samples']
            ours = model.extract_feat(inputs)
            theirs = [
                each.view(Batch(inputs, samples)).maps for each in teachers
            ]
        padded, shape = inputs.shape[2:], samples[0].img_shape
        share = [n / of for n, of in zip(shape, padded, strict=False)]
        found[image] = Attention(
            attention(ours, share),
            np.mean([attention(maps, share) for maps in theirs], axis=0),
        )
    return found


def attention(levels: Sequence[Tensor], share: Sequence[float]) -> np.ndarray:
    r"""Show where features are large, for any number of channels.

    For each level it is :math:`\mathrm{mean}_c F^2` without the padding,
    resized to the first level and divided by its sum; then the mean over the
    levels (Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR
    2017, with a sum of 1 in place of their Euclidean norm).

    Args:
        levels: Features, (1, C, H, W) each.
        share: The share of the height and of the width that is no padding.
    """
    maps: list[Tensor] = []
    for level in levels:
        rows, columns = (
            max(round(n * s), 1)
            for n, s in zip(level.shape[2:], share, strict=True)
        )
        energy = level.float()[..., :rows, :columns].square().mean(1, True)
        size = maps[0].shape[2:] if maps else energy.shape[2:]
        energy = F.interpolate(energy, size=tuple(size), mode='bilinear')
        maps.append(energy / energy.sum().clamp(min=1e-30))
    return torch.cat(maps).mean(0)[0].cpu().numpy()
