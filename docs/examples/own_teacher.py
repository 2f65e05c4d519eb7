"""A teacher that is no detector: any backbone, such as an image encoder."""

import functools
from typing import Any

import torch
from mmdet.models import DetDataPreprocessor
from torch import Tensor

import mmkd
from mmkd.detectors.blank import PROBE_SIZE, probe_sample
from mmkd.teachers.renormalize import Renormalize


@mmkd.TEACHERS.register_module()
class Encoder(mmkd.Teacher):
    """A frozen backbone whose maps teach the student's.

    Args:
        context: About the training.
        backbone: Config of a backbone; ``init_cfg`` names its weights.
        mean: What its pixels were normalised with, per channel, RGB.
        std: See ``mean``.
    """

    gives = frozenset({'features'})

    def __init__(
        self,
        *,
        context: mmkd.TeacherContext,
        backbone: dict[str, Any],
        mean: tuple[float, ...] = (123.675, 116.28, 103.53),
        std: tuple[float, ...] = (58.395, 57.12, 57.375),
    ) -> None:
        self.network = mmkd.MODELS.build(backbone)
        self.network.init_weights()
        self.network.requires_grad_(False)
        self.network.eval()
        own = DetDataPreprocessor(mean=mean, std=std, bgr_to_rgb=True)
        self.renormalize = Renormalize(context.student.data_preprocessor, own)
        # It knows no classes of its own, so the student's stand in.
        self.class_map = context.class_map(context.classes)

    def view(self, batch: mmkd.Batch) -> 'EncoderView':
        return EncoderView(self, batch)

    def blank(self, device: torch.device) -> 'EncoderView':
        image = torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE, device=device)
        return EncoderView(self, mmkd.Batch(image, [probe_sample()]))

    def to(self, device: torch.device) -> 'Encoder':
        self.network.to(device)
        self.class_map.to(device)
        return self


class EncoderView(mmkd.TeacherView):
    """What the encoder makes of one batch, computed when it is read."""

    def __init__(self, teacher: Encoder, batch: mmkd.Batch) -> None:
        self.class_map, self.cache = teacher.class_map, {}
        self.teacher, self.batch = teacher, batch

    @functools.cached_property
    def maps(self) -> tuple[Tensor, ...]:
        pixels = self.teacher.renormalize(
            self.batch.inputs, self.batch.data_samples
        )
        with torch.no_grad():
            return tuple(self.teacher.network(pixels))

    def features(
        self,
        path: str,
        student: mmkd.StepRecord,
        student_path: str | None = None,
    ) -> tuple[Tensor, ...]:
        return self.maps  # whatever path is asked for
