"""A pretrained image encoder, such as DINOv2, as a teacher of features."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmengine.logging import print_log
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.detectors.blank import PROBE_SIZE, image_channels, probe_sample
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError
from mmkd.registry import TEACHERS
from mmkd.utils import isolated_random_state

from .class_map import ClassMap
from .frozen import frozen_pass
from .pretrained import WHERE, load_pretrained
from .renormalize import Renormalize
from .speed import Speed
from .view import FEATURES, Teacher, TeacherContext, TeacherView


@TEACHERS.register_module()
class FoundationEncoder(Teacher):
    """A frozen image encoder of Hugging Face's transformers.

    It gives the tokens of its patches as one map, (B, C, h, w), without the
    class token and registers, to every method that reads features. It knows
    no classes: the student's stand in for its own.

    The student's batch is converted to the encoder's normalisation (its
    ``preprocessor_config.json``), and resized (bilinear, antialiased) to
    multiples of the patch. The padding of an image has the encoder's mean
    colour. It takes part in the encoder's attention, as it does in its
    student's, but methods leave its tokens out. Position embeddings are
    interpolated to the size of the batch.

    Args:
        context: What the teacher is told about the training.
        name: A model's name on the Hugging Face Hub, such as
            ``'facebook/dinov2-small'``, or the folder of one. Its licence is
            printed, because it may say what may be done with a student.
        size: The longer side, in pixels, to which the encoder's copy of a
            batch is resized. None keeps the batch's size, but for rounding to
            the patch. An encoder's time grows with the square of this
            number, or faster.
        autocast: ``'bfloat16'`` or ``'float16'`` to compute in half
            precision. What methods read is still single precision.

    Raises:
        PackageError: If transformers is not installed.
        ConfigError: If the model does not exist or is of another kind, or an
            option has another value.
        CheckpointError: If the weights do not fill the network.
    """

    gives = frozenset({FEATURES})
    remedy = 'An image encoder has no heads. '

    def __init__(
        self,
        *,
        context: TeacherContext,
        name: str,
        size: int | None = None,
        autocast: str | None = None,
    ) -> None:
        self.speed = Speed(autocast=autocast)
        with isolated_random_state():
            self.encoder = load_pretrained(name)
        self.network = self.encoder.network
        self.name, self.size = name, size
        self._check(context)
        pixels = self.encoder.pixels
        own = DetDataPreprocessor(
            mean=pixels.mean, std=pixels.std, bgr_to_rgb=True
        )
        self.renormalize = Renormalize(context.student.data_preprocessor, own)
        self.class_map = ClassMap(context.classes, context.classes)
        self.told = False
        """Whether it has been said that batches are resized."""
        print_log(
            f'The licence of the teacher {name}: {self.encoder.licence}',
            'current',
        )

    def view(self, batch: Batch) -> 'EncoderView':
        if not self.told:
            self._tell(batch)
        return EncoderView(self, batch)

    def blank(self, device: torch.device) -> 'EncoderView':
        channels = self.encoder.channels
        image = torch.zeros(1, channels, PROBE_SIZE, PROBE_SIZE, device=device)
        return EncoderView(self, Batch(image, [probe_sample()]))

    def to(self, device: torch.device) -> 'FoundationEncoder':
        self.encoder.network.to(device)
        self.class_map.to(device)
        return self

    def describe(self) -> str:
        encoder = self.encoder
        return (
            f'{type(encoder.network).__name__} ({self.name}), which gives '
            f'{encoder.width} channels for patches of {encoder.patch} x '
            f'{encoder.patch} pixels'
        )

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """Return the size at which it sees a batch of some size in pixels."""
        patch = self.encoder.patch
        scale = self.size / max(height, width) if self.size else 1.0
        rows, columns = (
            max(round(side * scale / patch), 1) for side in (height, width)
        )
        return rows * patch, columns * patch

    def _tell(self, batch: Batch) -> None:
        """Say once that the patch does not divide the batches."""
        self.told = True
        height, width = batch.inputs.shape[-2:]
        fitted = self.fitted(height, width)
        if self.size is None and fitted != (height, width):
            print_log(
                f'The teacher {self.name} sees batches resized to multiples '
                f'of its patch of {self.encoder.patch} pixels: the first one, '
                f'{height} x {width}, as {fitted[0]} x {fitted[1]}',
                'current',
            )

    def _check(self, context: TeacherContext) -> None:
        patch, size = self.encoder.patch, self.size
        whole = isinstance(size, int) and not isinstance(size, bool)
        if size is not None and (not whole or size < patch):
            raise ConfigError(
                f'{WHERE}.size must be None or a whole number of at least '
                f'{patch} pixels, the patch of {self.name}, got {size!r}.'
            )
        ours, theirs = image_channels(context.student), self.encoder.channels
        if ours != theirs:
            raise ConfigError(
                f'{WHERE}: {self.name} reads images of {theirs} channels, the '
                f'student of {ours}, and both see the same batch. Let the '
                f'student read images of {theirs} channels, or take another '
                'teacher.'
            )


class EncoderView(TeacherView):
    """What an encoder makes of one batch, computed when it is read."""

    def __init__(self, teacher: FoundationEncoder, batch: Batch) -> None:
        self.class_map = teacher.class_map
        self.cache: dict[str, Any] = {}
        self._teacher, self._batch = teacher, batch

    @functools.cached_property
    @frozen_pass
    def maps(self) -> tuple[Tensor, ...]:
        """The tokens of the patches, one level (B, C, h, w)."""
        teacher, batch = self._teacher, self._batch
        images = teacher.renormalize(batch.inputs, batch.data_samples)
        size = teacher.fitted(*images.shape[-2:])
        if size != images.shape[-2:]:
            images = F.interpolate(
                images, size=size, mode='bilinear', antialias=True
            )
        with teacher.speed.computing(images.device):
            tokens = teacher.encoder(images)
        return (teacher.speed.leaving(tokens),)

    def features(
        self, path: str, student: StepRecord, student_path: str | None = None
    ) -> tuple[Tensor, ...]:
        """Return the tokens of the patches, whatever path is asked for."""
        return self.maps
