"""Conditional objectness prediction (COP) for PAA."""

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from mmdet.models.dense_heads import PAAHead
from mmengine.model import normal_init
from torch import Tensor, nn

from mmkd.detectors.logit import logit
from mmkd.errors import ConfigError
from mmkd.registry import MODELS
from mmkd.utils import Official

WINDOW = 3


@MODELS.register_module()
class COPHead(PAAHead):
    r"""PAA's head with classes weighted by a conditional objectness.

    .. math::
        p_{c,i} = \frac{1}{9} \sum_{k \in 3 \times 3}
            \sigma(z^{cls}_{c,k}) \, \sigma(z^{coef}_{i,k})

    for class c at position i. The 9 coefficients of a position come from a
    3x3 convolution on the regression tower. The head returns
    :math:`\mathrm{logit}(p)`. The stock focal loss is therefore that of the
    probability, the stock score is :math:`\sqrt{p \cdot IoU}`, and LAD, CoLAD
    and every method on class logits work as on ``PAAHead``. The gradient is
    that of the official loss, which takes the probability itself, however
    small it is.

    A stock config switches to it by ``bbox_head=dict(type='mmkd.COPHead')``.
    The weights of a trained ``PAAHead`` fit, except for the new convolution.

    Source: Nguyen et al., "Improving Object Detection by Label Assignment
    Distillation", WACV 2022, https://arxiv.org/abs/2108.10520. The official
    code (cybercore-co-ltd/CoLAD_paper) sets the logits beyond the border to 0,
    which is a probability of 0.5. Here the probability there is 0.

    Raises:
        ConfigError: If there are several anchors per position.
    """

    official: ClassVar[Sequence[Official]] = (
        Official(
            code='https://github.com/cybercore-co-ltd/CoLAD_paper',
            compared='tests/detectors/heads/test_cop.py::TestOfficialCode',
            differs=(
                'The probability beyond the border is 0; there it is 0.5.'
            ),
        ),
    )

    def _init_layers(self) -> None:
        super()._init_layers()
        if self.num_base_priors != 1:
            raise ConfigError(
                'COPHead needs one anchor per position; the anchor_generator '
                f'gives {self.num_base_priors}. Set scales_per_octave=1 and '
                'one ratio.'
            )
        self.cop_coefficients = nn.Conv2d(
            self.feat_channels, WINDOW**2, 3, padding=1
        )

    def init_weights(self) -> None:
        super().init_weights()
        normal_init(self.cop_coefficients, std=0.01)

    def forward_single(
        self, x: Tensor, scale: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return class logits, box deltas and IoU logits of a level."""
        classes, boxes = x, x
        for layer in self.cls_convs:
            classes = layer(classes)
        for layer in self.reg_convs:
            boxes = layer(boxes)
        probability = conditional_objectness(
            self.atss_cls(classes), self.cop_coefficients(boxes)
        )
        return (
            logit(probability),
            scale(self.atss_reg(boxes)).float(),
            self.atss_centerness(boxes),
        )


def conditional_objectness(classes: Tensor, coefficients: Tensor) -> Tensor:
    """Weight and average the class probabilities in each position's window.

    Args:
        classes: (B, C, H, W) logits.
        coefficients: (B, 9, H, W) logits.

    Returns:
        (B, C, H, W) probabilities, float32.
    """
    images, channels, height, width = classes.shape
    windows = F.unfold(
        classes.float().sigmoid(), WINDOW, padding=WINDOW // 2
    ).view(images, channels, WINDOW**2, height, width)
    weights = coefficients.float().sigmoid()[:, None]
    return (windows * weights).mean(2)
