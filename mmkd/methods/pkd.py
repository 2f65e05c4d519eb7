"""PKD: distillation by Pearson correlation (Cao et al., NeurIPS 2022)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.detectors.record import StepRecord
from mmkd.losses import pkd_loss
from mmkd.registry import METHODS
from mmkd.teachers.view import TeacherView
from mmkd.utils import Official

from .feature_base import FeatureMethod, position_weights

CODE = (
    'https://github.com/open-mmlab/mmrazor/tree/main/configs/distill/mmdet/pkd'
)
COMPARED = 'tests/methods/test_pkd.py::TestOfficialCode'
DIFFERS = (
    'Padding does not count, and the deviation is not the unbiased one, which '
    'is a factor of 1 - 1 / (B H W) in the loss.'
)


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
    NeurIPS 2022, https://arxiv.org/abs/2207.02039. The official configs
    (MMRazor) have the weight 6 for Faster R-CNN and for a RetinaNet that
    learns from Mask R-CNN with Swin, and 10 for RetinaNet, for RetinaNet that
    learns from FCOS, and for RepPoints. All take the first four FPN levels.
    The official code divides by the unbiased standard deviation, which makes
    the loss smaller by the factor :math:`1 - 1 / (B H W)`, and counts the
    padding of the images.

    Args:
        per_image: Take statistics over each image instead of the batch.
        loss_weight: Weight of the method; 10 in the official configs of most
            one-stage detectors.
        **features: Which features are compared, and how: the other options
            of :class:`FeatureMethod`.

    Raises:
        ConfigError: If the features cannot be compared.
    """

    official: ClassVar[Sequence[Official]] = (
        Official(
            code=CODE,
            compared=COMPARED,
            options=dict(
                loss_weight=6.0, levels=[0, 1, 2, 3], per_image=False
            ),
            config='pkd_faster_rcnn_r50.py',
            ap='Faster R-CNN R101→R50, 2x: 38.4→40.3',
            differs=DIFFERS,
        ),
        Official(
            code=CODE,
            compared=COMPARED,
            options=dict(
                loss_weight=10.0, levels=[0, 1, 2, 3], per_image=False
            ),
            config='pkd_retinanet_r50.py',
            ap='RetinaNet X101→R50, 2x: 37.4→40.8',
            differs=DIFFERS,
        ),
    )

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
