"""Features of a pretrained image encoder, imitated by direction."""

from collections.abc import Sequence

from torch import Tensor, nn

from mmkd.core.method import Method
from mmkd.data.batch import Batch
from mmkd.detectors.adapters import build_adapter, resize_to
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError
from mmkd.losses import cosine_loss
from mmkd.registry import METHODS
from mmkd.teachers.view import FEATURES, TeacherView
from mmkd.utils import Official

from .feature_base import image_weights


@METHODS.register_module()
class FoundationFeatures(Method):
    r"""A map of the student points where an image encoder's tokens point.

    .. math::
        L = \frac{1}{B} \sum_b \frac{1}{|I_b|} \sum_{i \in I_b}
            \bigl(1 - \cos(W F^s_{b,i}, T_{b,i})\bigr)

    over the positions :math:`I_b` of each image without its padding. W is one
    1x1 convolution, which only the training has. T is the encoder's map of
    patch tokens, resized (bilinear) to the student's map. Cosines compare
    directions, so that the encoder's scale does not matter, and no labels are
    read. Any teacher of features will do; it is made for
    ``mmkd.FoundationEncoder``.

    Source: Liao, Zhao, Shan, Yan, Liu, Lu, Ji, Chen, "RT-DETRv4: Painlessly
    Furthering Real-Time Object Detection with Vision Foundation Models",
    arXiv 2025, https://arxiv.org/abs/2510.25257. There the student's map is
    the last one of RT-DETR's hybrid encoder (stride 32), before its levels
    are fused, the teacher is DINOv3 ViT-B/16, and the image is halved for it
    (``size=320`` of the teacher at 640 pixels), so that both maps have the
    same size. RT-DETRv4-S begins with the weight 5, which the paper's
    adaptive weight then changes, as ``mmkd.GradientBalanceHook`` does.
    lightly-train's distillation v2, which pretrains a backbone alone,
    resizes the student's map to the teacher's instead, imitates the last two
    blocks of the encoder, and compares by squared differences.

    Args:
        source: Module path in the student: ``'backbone'``, ``'neck'``, or any
            other module whose output is a map (B, C, H, W) of every image, or
            several of them by level.
        level: Which of the source's levels is compared; the last by default.
            To compare several, use the method several times.
        loss_weight: Weight of the method.

    Raises:
        ConfigError: If an option is wrong, or the source or the teacher
            gives no maps of whole images.
        TapError: If the source never produced anything.
    """

    needs = (FEATURES,)
    needs_labels = False
    official = (
        Official(
            code='https://github.com/RT-DETRs/RT-DETRv4',
            compared='tests/methods/test_foundation_features.py'
            '::TestOfficialCode',
            options=dict(loss_weight=5.0),
            differs='Padding does not count; the official detector has none. '
            'The adaptive weight is `GradientBalanceHook`.',
        ),
    )

    def __init__(
        self,
        *,
        source: str = 'backbone',
        level: int = -1,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        self.check_whole(-1, level=level)
        self.source, self.level = source, level
        self.adapter: nn.Module = nn.Identity()
        self.where = f'{type(self).__name__} on "{source}"'

    @property
    def student_paths(self) -> Sequence[str]:
        return (self.source,)

    @property
    def teacher_paths(self) -> Sequence[str]:
        return ('neck',)

    def prepare(self, student: StepRecord, teacher: TeacherView) -> None:
        ours, theirs = self._maps(student, teacher)
        for role, feature in (('student', ours), ('teacher', theirs)):
            if feature.dim() != 4 or self.source.startswith('roi_head.'):
                raise ConfigError(
                    f'{self.where}: the {role} must give maps (B, C, H, W) '
                    f'of whole images, got {tuple(feature.shape)}. Tap the '
                    'backbone, the neck or a convolution before the RoIs.'
                )
        self.adapter = build_adapter(
            ours, theirs, adapt=True, where=self.where
        )

    def forward(
        self, student: StepRecord, teacher: TeacherView, batch: Batch
    ) -> dict[str, Tensor]:
        ours, theirs = self._maps(student, teacher)
        weights = image_weights(batch.data_samples, ours)
        target = resize_to(theirs.float(), ours.shape)
        distances = cosine_loss(self.adapter(ours), target)
        if weights is None:
            return {'cosine': distances.mean()}
        return {'cosine': (distances * weights[:, 0]).sum() / len(distances)}

    def _maps(
        self, student: StepRecord, teacher: TeacherView
    ) -> tuple[Tensor, Tensor]:
        """Return the student's map and the teacher's."""
        levels = student.features(self.source)
        if self.level >= len(levels):
            raise ConfigError(
                f'{self.where}: level {self.level} is asked for, but there '
                f'are {len(levels)} (0 to {len(levels) - 1}).'
            )
        theirs = teacher.features('neck', student, self.source)[-1]
        return levels[self.level], theirs
