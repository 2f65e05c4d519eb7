"""The frozen detector that is distilled from."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmengine.logging import print_log
from torch import Tensor, nn

from mmkd.detectors.record import Outputs
from mmkd.detectors.source import (
    build_trained,
    check_class_count,
    class_names,
    find_in_model_index,
    load_config,
)
from mmkd.errors import ConfigError
from mmkd.utils import check_options, isolated_random_state

from .cache import CachedOutputs, TeacherCache, check_cache_options
from .class_map import ClassMap, Renormalize
from .frozen_view import TeacherOutputs
from .speed import SPEED_OPTIONS, Speed, eagerly, speed_up

__all__ = [
    'ClassMap',
    'Renormalize',
    'Teacher',
    'TeacherOutputs',
    'build_teacher',
    'class_names',
]

TEACHER_OPTIONS = (
    'name',
    'config',
    'checkpoint',
    'cfg_options',
    'trust_checkpoint',
    *SPEED_OPTIONS,
    'cache',
)


class Teacher:
    """A frozen detector, its class map and its view of a student's batch.

    It is no ``nn.Module`` on purpose: as a child of the student it would be
    optimised, saved, averaged (EMA) and put into train mode.

    Args:
        model: The detector with its weights.
        classes: Its class names.
        student: The student's detector, for the normalisation.
        student_classes: The student's class names.
        paths: Module paths that methods read.
    """

    def __init__(
        self,
        model: Any,
        classes: Sequence[str],
        *,
        student: Any,
        student_classes: Sequence[str],
        paths: Iterable[str] = (),
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.classes = tuple(classes)
        self.paths = tuple(paths)
        self.speed = Speed()
        self.cache: TeacherCache | None = None
        self.class_map = ClassMap(student_classes, classes)
        self.renormalize = Renormalize(
            student.data_preprocessor, model.data_preprocessor
        )

    @property
    def networks(self) -> dict[str, 'Teacher']:
        """The frozen networks by their names in logs: this one."""
        return {'teacher': self}

    def __call__(
        self, inputs: Tensor, data_samples: Sequence[DetDataSample]
    ) -> TeacherOutputs:
        """View the student's batch (B, 3, H, W); nothing runs yet."""
        view = TeacherOutputs if self.cache is None else CachedOutputs
        return view(self, inputs, data_samples)

    def __deepcopy__(self, memo: dict[int, Any]) -> 'Teacher':
        return self  # frozen: copies of the student share it

    def blank(self, run: Callable[[Any, Iterable[str]], Outputs]) -> Outputs:
        """The network's outputs for a blank image, from ``run``."""
        with eagerly(self.speed):
            return run(self.model, self.paths)

    def to(self, device: torch.device | str) -> 'Teacher':
        """Move the network to ``device``, in place."""
        self.model.to(device)
        self.class_map.to(device)
        return self


def build_teacher(
    cfg: Mapping[str, Any] | str,
    *,
    student: nn.Module,
    student_classes: Sequence[str],
    paths: Iterable[str] = (),
) -> Teacher:
    """Build and load the teacher that ``distillation.teacher`` describes.

    Args:
        cfg: The name of a model in MMDetection's installed model index, or a
            dict with ``name``, or with ``config`` (a path, ``mmdet::…``, a
            config dict) and ``checkpoint`` (a path or URL; None for an
            untrained network, with a warning). ``cfg_options`` overrides
            entries of the config; ``trust_checkpoint`` allows a pickle that
            holds more than weights. The options of
            :class:`~mmkd.teachers.speed.Speed` make it faster, and ``cache``
            (the options of :class:`~mmkd.teachers.cache.TeacherCache`) keeps
            on disk what it has computed.
        student: The student's detector.
        student_classes: The student's class names.
        paths: Module paths that methods read.

    Raises:
        ConfigError: If the description is incomplete or unknown.
        CheckpointError: If the checkpoint does not fit the config exactly.
    """
    options: dict[str, Any] = (
        {'name': cfg} if isinstance(cfg, str) else dict(cfg)
    )
    check_options('distillation.teacher', options, TEACHER_OPTIONS)
    if 'name' in options:
        options = {**find_in_model_index(options.pop('name')), **options}
    if 'config' not in options:
        raise ConfigError(
            'distillation.teacher needs a "config" (a path, "mmdet::…" or a '
            'dict) and a "checkpoint", or the "name" of a model in '
            f"MMDetection's index; got {sorted(options)}."
        )
    if 'checkpoint' not in options:
        raise ConfigError(
            'distillation.teacher has no "checkpoint". Give the path or URL '
            'of its trained weights, or checkpoint=None for an untrained '
            'teacher in a smoke test.'
        )
    speed = Speed(**{k: options[k] for k in SPEED_OPTIONS if k in options})
    cache = options.get('cache')
    if cache is not None:
        cache = check_cache_options(cache)
    config = load_config(options['config'])
    if options.get('cfg_options'):
        overrides = dict(options['cfg_options'])
        check_options(
            'distillation.teacher.cfg_options: its config',
            (key.partition('.')[0] for key in overrides),
            config,
        )
        config.merge_from_dict(overrides)
    with isolated_random_state():
        model, meta = build_trained(
            config.model,
            options['checkpoint'],
            trust=bool(options.get('trust_checkpoint', False)),
        )
    classes = class_names(meta, config)
    if classes is None:
        classes = tuple(student_classes)
        print_log(
            "Neither the teacher's checkpoint nor its config names its "
            f"classes; the student's are assumed: {', '.join(classes)}",
            'current',
            logging.WARNING,
        )
    check_class_count(model, classes, 'distillation.teacher')
    teacher = Teacher(
        model,
        classes,
        student=student,
        student_classes=student_classes,
        paths=paths,
    )
    device = next(student.parameters()).device
    if speed != Speed():
        speed_up(teacher, speed, device)
    if cache is not None:
        teacher.cache = TeacherCache(
            teacher.to(device), config.model.to_dict(), **cache
        )
    return teacher
