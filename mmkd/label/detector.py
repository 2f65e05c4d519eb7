"""What labels: a detector of MMDetection, or a teacher without a student."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DefaultScope

from mmkd.data.checkpoint_loader import trusts
from mmkd.detectors.source import (
    build_trained,
    find_in_model_index,
    load_config,
)
from mmkd.errors import ConfigError
from mmkd.export.command import load
from mmkd.teachers.build import build_teacher
from mmkd.teachers.detections import Found
from mmkd.teachers.foreign import ForeignDetector
from mmkd.teachers.view import TeacherContext

ALONE = TeacherContext(None, (), named=False)
"""The context of a teacher that teaches nobody yet."""


class Detector(Protocol):
    """What labels images."""

    classes: tuple[str, ...]

    def detect(
        self, images: Sequence[np.ndarray], names: Sequence[str]
    ) -> list[Found | None]:
        """Return what is found in each image (H, W, 3), uint8, RGB."""


class MMDetector:
    """A detector of MMDetection with the test pipeline of its config.

    Args:
        config: Its config.
        source: What the config is called in messages.
        checkpoint: Its weights.
        texts: The classes of a detector that is told them as text (Grounding
            DINO, GLIP).
    """

    def __init__(
        self,
        config: Config,
        source: str,
        checkpoint: str,
        texts: Sequence[str] = (),
    ) -> None:
        self.model: Any
        if texts:
            model, _ = build_trained(
                config.model, checkpoint, trust=trusts(config), who='detector'
            )
            self.model = model.eval()
        else:
            self.model, classes = load(config, source, checkpoint)
        if torch.cuda.is_available():
            self.model.cuda()
        self.classes = tuple(texts) if texts else classes
        self._asked: dict[str, Any] = {}
        if texts:
            # As mmdet's own inferencer asks.
            text = ' . '.join(texts) + ' . '
            self._asked = dict(text=text, custom_entities=True)
        steps = get_test_pipeline_cfg(config.copy())
        steps[0].type = 'mmdet.LoadImageFromNDArray'
        with DefaultScope.overwrite_default_scope('mmdet'):
            self._pipeline = Compose(steps)

    def detect(
        self, images: Sequence[np.ndarray], names: Sequence[str]
    ) -> list[Found | None]:
        found: list[Found | None] = []
        for image in images:
            bgr = np.ascontiguousarray(image[..., ::-1])
            data = dict(img=bgr, img_id=0, **self._asked)
            batch = pseudo_collate([self._pipeline(data)])
            with torch.inference_mode():
                (sample,) = self.model.test_step(batch)
            result = sample.pred_instances.numpy()
            found.append(Found(result.bboxes, result.scores, result.labels))
        return found


def build_detector(
    options: Mapping[str, Any], texts: Sequence[str] = ()
) -> Detector:
    """Build what labels.

    Args:
        options: What ``distillation.teacher`` would be.
        texts: See :class:`MMDetector`.

    Raises:
        ConfigError: If it is a teacher that needs a student.
    """
    if 'type' not in options:
        if 'name' in options:
            options = {**find_in_model_index(options['name']), **options}
        config, checkpoint = str(options['config']), options['checkpoint']
        return MMDetector(load_config(config), config, checkpoint, texts)
    if texts:
        raise ConfigError(
            '--texts is for detectors of MMDetection that are told their '
            f'classes as text; {options["type"]} has classes of its own. '
            'Leave it out.'
        )
    teacher = build_teacher(options, ALONE)
    if not isinstance(teacher, ForeignDetector):
        raise ConfigError(
            f'--teacher: {type(teacher).__name__} does not run on images by '
            'itself. Give a detector: a config, a name in the model index, '
            'an ONNX file, or a function (module:function).'
        )
    return teacher


def described(options: Mapping[str, Any]) -> str:
    """Return what the result says of the detector."""
    for key in ('name', 'file', 'function', 'config'):
        if key in options:
            return Path(str(options[key])).name
    return str(options['type'])
