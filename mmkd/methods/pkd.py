"""PKD: distillation by Pearson correlation (Cao et al., NeurIPS 2022)."""

from typing import Any

import torch
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.detectors.record import StepRecord
from mmkd.losses import pkd_loss
from mmkd.registry import METHODS
from mmkd.teachers.view import TeacherView

from .feature_base import FeatureMethod, position_weights


@METHODS.register_module()
class PKD(FeatureMethod):
    r"""Features that correlate with the teacher's, whatever their scale.

    .. math::
        L = \sum_l \frac{1}{2} \, \overline{(\hat F^s - \hat F^t)^2}
          = \sum_l \frac{1}{C} \sum_{c=1}^{C} (1 - r_c), \qquad
        \hat F_c = \frac{F_c - \mu_c}{\sigma_c}

    over the levels l. The mean and standard deviation of a channel are taken
    over its positions in *all images of the batch*, (B, H, W), and
    :math:`r_c` is the Pearson correlation of student and teacher over the
    same positions, without padding. Only patterns count, so detectors of
    different kinds, whose features differ in magnitude, can be paired.

    Statistics of the batch are the default, because the paper normalises in
    this way and its figures come from it. An image's loss then depends on the
    other images in the batch of its process. ``per_image=True`` takes each
    image's own statistics, and averages over the images.

    Source: Cao, Zhang, Gao, Cheng, Cheng, Zhang, "PKD: General Distillation
    Framework for Object Detectors via Pearson Correlation Coefficient",
    NeurIPS 2022, https://arxiv.org/abs/2207.02039, with the weight 6. The
    official code (MMRazor) is this formula with the unbiased standard
    deviation, a difference of 1 / (B H W), and takes the first four FPN levels
    of Faster R-CNN.

    Args:
        per_image: Take statistics over each image instead of the batch.
        loss_weight: Weight of the method.
        **features: Which features are compared, and how: the other options
            of :class:`FeatureMethod`.

    Raises:
        ConfigError: If the features cannot be compared.
    """

    def __init__(
        self,
        *,
        per_image: bool = False,
        loss_weight: float = 6.0,
        **features: Any,
    ) -> None:
        super().__init__(loss_weight=loss_weight, **features)
        self.per_image = per_image

    def forward(
        self,
        student: StepRecord,
        teacher: TeacherView,
        batch: Batch,
    ) -> dict[str, Tensor]:
        losses = [
            pkd_loss(
                s,
                t,
                position_weights(batch.data_samples, t),
                per_image=self.per_image,
            ).mean()
            for s, t in self.pairs(student, teacher)
        ]
        return {'pkd': torch.stack(losses).sum()}
