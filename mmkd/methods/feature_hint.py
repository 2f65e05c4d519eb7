"""Hint learning: the student's features approach the teacher's."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from mmkd.adapters import (
    build_adapter,
    check_levels,
    check_sizes,
    resize_to,
)
from mmkd.outputs import Outputs
from mmkd.registry import METHODS, MODELS
from mmkd.utils import ConfigError, build_checked

from .base import Method

if TYPE_CHECKING:
    from mmkd.teacher import TeacherOutputs


@METHODS.register_module()
class FeatureHint(Method):
    r"""Hint learning with adaptation layers, for any pair of detectors.

    .. math::
        L = \frac{1}{n} \sum_{l=1}^{n}
            L_{hint}(\mathrm{adapt}_l(F^s_l), F^t_l)

    over the n pairs of levels. Maps are averaged per image over its
    positions, without the padding, then over the images: what shares a batch
    does not matter. The RoIs' features are averaged over all RoIs. Student
    maps of another size are resized (bilinear), never cropped.

    Source: Romero et al., "FitNets", ICLR 2015; for detectors Chen et al.,
    "Learning Efficient Object Detection Models with Knowledge Distillation",
    NeurIPS 2017, which adapts also at equal widths and finds that it helps.

    Args:
        source: Module path in the student: ``'neck'`` (the backbone in
            detectors without one), ``'backbone'``, or any other such as
            ``'roi_head.bbox_head.shared_fcs.1'`` (the vectors of the RoIs).
        teacher_source: Module path in the teacher; the same by default.
            Within its RoI head it runs on the student's RoIs.
        levels: The student's levels to use, from 0; all by default.
        teacher_levels: The teacher's levels to pair with them; the same
            numbers by default.
        adapt: 1x1 convolutions (linear layers for vectors); False compares
            the features as they are.
        resize: Allow sizes that differ by a factor, not only by rounding.
        loss: Config of the loss, with the signature of
            :class:`~mmkd.losses.HintLoss`, which is the default.
        loss_weight: Weight of the method.

    Raises:
        ConfigError: If the features cannot meet.
        TapError: If a source never produced anything.
    """

    def __init__(
        self,
        *,
        source: str = 'neck',
        teacher_source: str | None = None,
        levels: Sequence[int] | None = None,
        teacher_levels: Sequence[int] | None = None,
        adapt: bool = True,
        resize: bool = False,
        loss: Mapping[str, Any] | None = None,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        self.source = source
        self.teacher_source = teacher_source or source
        self.levels = _checked_levels('levels', levels)
        self.teacher_levels = self.levels
        if teacher_levels is not None:
            self.teacher_levels = _checked_levels(
                'teacher_levels', teacher_levels
            )
        self.adapt = adapt
        self.resize = resize
        loss = {'type': 'mmkd.HintLoss'} if loss is None else loss
        self.loss = build_checked(MODELS, loss, 'FeatureHint.loss')
        self.adapters = nn.ModuleList()

    @property
    def student_paths(self) -> Sequence[str]:
        return (self.source,)

    @property
    def teacher_paths(self) -> Sequence[str]:
        return (self.teacher_source,)

    def prepare(self, student: Outputs, teacher: Outputs) -> None:
        where = f'FeatureHint on "{self.source}"'
        ours = _choose(student.features(self.source), self.levels, where)
        theirs = _choose(
            teacher.features(self.teacher_source), self.teacher_levels, where
        )
        check_levels(ours, theirs, where)
        self.adapters = nn.ModuleList(
            build_adapter(s, t, adapt=self.adapt, where=f'{where}, level {i}')
            for i, (s, t) in enumerate(zip(ours, theirs, strict=True))
        )
        check_sizes(ours, theirs, resize=self.resize, where=where)

    def forward(
        self,
        student: Outputs,
        teacher: 'TeacherOutputs',
        data_samples: Sequence[DetDataSample],
    ) -> dict[str, Tensor]:
        ours = student.features(self.source)
        theirs = teacher.features(self.teacher_source, student, self.source)
        ours = _choose(ours, self.levels, self.source)
        theirs = _choose(theirs, self.teacher_levels, self.teacher_source)
        check_levels(ours, theirs, f'FeatureHint on "{self.source}"')
        losses = [
            self._level_loss(adapter(s), t, data_samples)
            for adapter, s, t in zip(self.adapters, ours, theirs, strict=True)
        ]
        return {'hint': torch.stack(losses).mean()}

    def _level_loss(
        self,
        adapted: Tensor,
        target: Tensor,
        data_samples: Sequence[DetDataSample],
    ) -> Tensor:
        adapted = resize_to(adapted, target.shape)
        # What a RoI head computes has no padding: its first axis is RoIs.
        of_images = not self.source.startswith('roi_head.')
        weight = image_weights(data_samples, target) if of_images else None
        if weight is None:
            return self.loss(adapted, target)
        channels_and_images = target.shape[0] * target.shape[1]
        return self.loss(adapted, target, weight, channels_and_images)


def image_weights(
    data_samples: Sequence[DetDataSample], maps: Tensor
) -> Tensor | None:
    """Weights of the positions of maps that average over each image alone.

    Args:
        data_samples: One a map, with ``img_shape`` and, from the data
            preprocessor, ``batch_input_shape``.
        maps: (B, C, H, W).

    Returns:
        (B, 1, H, W), 1/n on the n positions of the image and 0 on padding;
        None where nothing is padded (or for vectors).
    """
    if maps.dim() != 4:
        return None
    shapes = [sample.img_shape[:2] for sample in data_samples]
    full = data_samples[0].metainfo.get('batch_input_shape', shapes[0])
    if all(tuple(shape) == tuple(full) for shape in shapes):
        return None
    images, _, height, width = maps.shape
    if images != len(shapes):
        raise ConfigError(
            f'a tapped map holds {images} images, the batch {len(shapes)}: '
            'padding cannot be told apart. Tap a module that sees every '
            'image once, such as the neck.'
        )
    weights = torch.zeros(images, 1, height, width, device=maps.device)
    for weight, (h, w) in zip(weights, shapes, strict=True):
        rows = math.ceil(h * height / full[0])
        columns = math.ceil(w * width / full[1])
        weight[:, :rows, :columns] = 1 / (rows * columns)
    return weights


def _checked_levels(
    option: str, levels: Sequence[int] | None
) -> tuple[int, ...] | None:
    if levels is None:
        return None
    if (
        not isinstance(levels, Sequence)
        or not levels
        or any(not isinstance(level, int) or level < 0 for level in levels)
    ):
        raise ConfigError(
            f'FeatureHint.{option} must be a list of level numbers from 0, '
            f'got {levels!r}; leave it out for all levels.'
        )
    return tuple(levels)


def _choose(
    features: tuple[Tensor, ...], levels: Sequence[int] | None, where: str
) -> tuple[Tensor, ...]:
    if levels is None:
        return features
    if any(level >= len(features) for level in levels):
        raise ConfigError(
            f'{where}: levels {list(levels)} are asked for, there are '
            f'{len(features)} (0 to {len(features) - 1}).'
        )
    return tuple(features[level] for level in levels)
