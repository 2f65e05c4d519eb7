"""Attention transfer, a distillation method in a file of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkd


@mmkd.METHODS.register_module()
class AttentionTransfer(mmkd.Method):
    """The student looks where the teacher looks.

    The attention of a map (B, C, H, W) is its mean square over the channels,
    (B, H * W), scaled to length 1. The loss is the squared distance between
    the student's and the teacher's, averaged over images and levels.

    Source: Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR
    2017, https://arxiv.org/abs/1612.03928

    Args:
        source: Module path of the maps in both networks.
        loss_weight: Weight of the method.
    """

    needs = ('features',)
    needs_labels = False

    def __init__(
        self, *, source: str = 'neck', loss_weight: float = 1.0
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        self.source = source

    @property
    def student_paths(self) -> tuple[str, ...]:
        return (self.source,)

    teacher_paths = student_paths

    def forward(
        self,
        student: mmkd.StepRecord,
        teacher: mmkd.TeacherView,
        batch: mmkd.Batch,
    ) -> dict[str, Tensor]:
        ours = student.features(self.source)
        theirs = teacher.features(self.source, student)
        pairs = zip(ours, theirs, strict=True)
        losses = [attention_distance(s, t.detach()) for s, t in pairs]
        return {'attention': torch.stack(losses).mean()}


def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The distance of two maps (B, C, H, W) of the same height and width."""
    ours, theirs = (
        F.normalize(maps.square().mean(1).flatten(1), dim=1)
        for maps in (student, teacher)
    )
    return (ours - theirs).square().sum(1).mean()
