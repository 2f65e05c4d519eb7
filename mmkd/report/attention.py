"""Where detectors look, and where a student and its teacher disagree."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.data.batch import Batch

from .evaluation import load
from .work_dir import WorkDir


@dataclass
class Attention:
    """Where two networks look, (H, W) each, with a sum of 1.

    ``elsewhere`` is the share of the student's attention that lies elsewhere
    than the teacher's, from 0 to 1: half the sum of absolute differences.
    """

    student: np.ndarray
    teacher: np.ndarray

    @property
    def elsewhere(self) -> float:
        return float(abs(self.student - self.teacher).sum() / 2)


def attend(
    run: WorkDir, teacher: Any, ids: Sequence[Any]
) -> dict[Any, Attention]:
    """Compare a distilled student's features with its teacher's.

    Several teachers look where they do on average.

    Args:
        run: A run that distils.
        teacher: Its teachers, built.
        ids: Of the images.
    """
    model, loader = load(run, None)
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
                network.view(Batch(inputs, samples)).maps
                for network in teacher.networks.values()
            ]
        share = (
            samples[0].img_shape[0] / inputs.shape[2],
            samples[0].img_shape[1] / inputs.shape[3],
        )
        found[image] = Attention(
            attention(ours, share),
            np.mean([attention(maps, share) for maps in theirs], axis=0),
        )
    return found


def attention(levels: Sequence[Tensor], share: Sequence[float]) -> np.ndarray:
    r"""Where features are large: the same for any number of channels.

    Of each level :math:`\mathrm{mean}_c F^2`, without padding, as a share of
    its sum; then the mean over the levels, resized to the first (Zagoruyko &
    Komodakis, "Paying More Attention to Attention", ICLR 2017, with a sum of
    1 in place of their Euclidean norm).

    Args:
        levels: (1, C, H, W) each.
        share: Of the height and the width that is no padding.
    """
    maps = []
    size: tuple[int, ...] = ()
    for level in levels:
        rows, columns = (
            max(round(n * s), 1)
            for n, s in zip(level.shape[2:], share, strict=True)
        )
        energy = level.float()[..., :rows, :columns].square().mean(1, True)
        size = size or tuple(energy.shape[2:])
        energy = F.interpolate(
            energy, size=size, mode='bilinear', align_corners=False
        )
        maps.append(energy / energy.sum().clamp(min=1e-30))
    return torch.cat(maps).mean(0)[0].cpu().numpy()
