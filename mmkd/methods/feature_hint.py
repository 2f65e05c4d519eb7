"""Hint learning: the student's features approach the teacher's."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmdet.structures import DetDataSample
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.detectors.record import StepRecord
from mmkd.registry import METHODS, MODELS
from mmkd.teachers.view import TeacherView
from mmkd.utils import build_checked, process_share

from .feature_base import FeatureMethod, image_weights


@METHODS.register_module()
class FeatureHint(FeatureMethod):
    r"""Hint learning with adaptation layers, for any pair of detectors.

    .. math::
        L = \frac{1}{n} \sum_{l=1}^{n}
            L_{hint}(\mathrm{adapt}_l(F^s_l), F^t_l)

    over the n pairs of levels. Maps are averaged over the positions of each
    image, without the padding, and then over the images, so it does not
    matter which images share a batch. Features of RoIs are averaged over all
    RoIs of all processes. Student
    maps of another size are resized (bilinear), never cropped.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015,
    https://arxiv.org/abs/1412.6550; for detectors Chen et al., "Learning
    Efficient Object Detection Models with Knowledge Distillation", NeurIPS
    2017, which also adapts at equal widths and finds that it helps.

    Args:
        adapt: Adapt by 1x1 convolutions, or linear layers for vectors. None
            adapts only where the widths differ, False compares the features
            as they are.
        loss: Config of the loss, with the signature of
            :class:`~mmkd.losses.HintLoss`, which is the default.
        loss_weight: Weight of the method.
        **features: Which features are compared, and how: the other options
            of :class:`FeatureMethod`. Here ``source`` may also give vectors
            of RoIs, as ``'roi_head.bbox_head.shared_fcs.1'`` does; the
            teacher's RoI head then runs on the student's RoIs.

    Raises:
        ConfigError: If the features cannot be compared.
        TapError: If a source never produced anything.
    """

    images_only = False

    def __init__(
        self,
        *,
        adapt: bool | None = True,
        loss: Mapping[str, Any] | None = None,
        loss_weight: float = 1.0,
        **features: Any,
    ) -> None:
        super().__init__(adapt=adapt, loss_weight=loss_weight, **features)
        loss = {'type': 'mmkd.HintLoss'} if loss is None else loss
        self.loss = build_checked(MODELS, loss, 'FeatureHint.loss')

    def forward(
        self,
        student: StepRecord,
        teacher: TeacherView,
        batch: Batch,
    ) -> dict[str, Tensor]:
        losses = [
            self._level_loss(adapted, target, batch.data_samples)
            for adapted, target in self.pairs(student, teacher)
        ]
        return {'hint': torch.stack(losses).mean()}

    def _level_loss(
        self,
        adapted: Tensor,
        target: Tensor,
        data_samples: Sequence[DetDataSample],
    ) -> Tensor:
        # RoI features have no padding: their first axis is the RoIs.
        if self.source.startswith('roi_head.'):
            number = target.new_full((), len(target), dtype=torch.float32)
            share = number / process_share(number, least=1)
            summed = getattr(self.loss, 'reduction', '') == 'sum'
            return self.loss(adapted, target) * (1 if summed else share)
        weight = image_weights(data_samples, target)
        if weight is None:
            return self.loss(adapted, target)
        channels_and_images = target.shape[0] * target.shape[1]
        return self.loss(adapted, target, weight, channels_and_images)
