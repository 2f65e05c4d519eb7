"""Channel-wise distillation (Shu et al., ICCV 2021)."""

from typing import Any

import torch
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.detectors.record import StepRecord
from mmkd.losses import cwd_loss
from mmkd.registry import METHODS
from mmkd.teachers.view import TeacherView
from mmkd.utils import Official

from .feature_base import FeatureMethod, image_weights


@METHODS.register_module()
class CWD(FeatureMethod):
    r"""The distribution over positions where a channel is active.

    .. math::
        L = \sum_l \frac{T^2}{C} \sum_{c=1}^{C} \sum_{i=1}^{H W}
            \phi(F^t_{c,i}) \log \frac{\phi(F^t_{c,i})}{\phi(F^s_{c,i})},
        \qquad
        \phi(F_{c,i}) = \frac{\exp(F_{c,i} / T)}{\sum_j \exp(F_{c,j} / T)}

    over the levels l, averaged over the images. Positions on padding are not
    part of the distributions.

    Source: Shu, Liu, Gao, Yan, Shen, "Channel-wise Knowledge Distillation for
    Dense Prediction", ICCV 2021, https://arxiv.org/abs/2011.13256, sec. 3,
    written for segmentation. For detectors MMRazor's configs take every FPN
    level with T = 1, weight 10 and no adaptation, which are the defaults. The
    figure that is cited for RetinaNet comes from the repository to which the
    authors' own leads (pppppM/mmdetection-distiller): the first four levels,
    with weight 5. Its loss is the cross-entropy, which is larger by the
    teacher's entropy and has the same gradient. None of them leaves the
    padding out. A 1x1 convolution adapts where the widths differ, as in the
    paper. Class scores can be distilled too (``source='bbox_head.gfl_cls'``,
    in MMRazor 0.x with weight 5), where both networks have the same classes
    in the same order; others are refused.

    Args:
        temperature: T, above 0; softens the distributions.
        loss_weight: Weight of the method.
        **features: Which features are compared, and how: the other options
            of :class:`FeatureMethod`.

    Raises:
        ConfigError: If an option is outside its range or the features
            cannot be compared.
    """

    official = (
        Official(
            code='https://github.com/pppppM/mmdetection-distiller',
            compared='tests/methods/test_cwd.py::TestOfficialCode',
            options=dict(
                temperature=1.0, loss_weight=5.0, levels=[0, 1, 2, 3]
            ),
            config='cwd_retinanet_r50.py',
            ap='RetinaNet X101→R50, 2x: 37.4→40.5',
            differs='Padding is left out; the logged loss is smaller by the '
            "teacher's entropy, which has no gradient.",
        ),
        Official(
            code='https://github.com/open-mmlab/mmrazor',
            compared='tests/methods/test_cwd.py::TestOfficialCode',
            options=dict(temperature=1.0, loss_weight=10.0),
            differs='Padding is left out.',
        ),
    )

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        loss_weight: float = 10.0,
        **features: Any,
    ) -> None:
        super().__init__(loss_weight=loss_weight, **features)
        self.check_positive(temperature=temperature)
        self.temperature = temperature

    def forward(
        self,
        student: StepRecord,
        teacher: TeacherView,
        batch: Batch,
    ) -> dict[str, Tensor]:
        losses = [
            cwd_loss(
                s,
                t,
                image_weights(batch.data_samples, t),
                temperature=self.temperature,
            ).mean()  # the mean of (B, C)
            for s, t in self.pairs(student, teacher)
        ]
        return {'cwd': torch.stack(losses).sum()}
