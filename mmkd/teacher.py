"""The frozen detector that is distilled from."""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmengine.logging import print_log
from torch import Tensor, nn

from .outputs import BoxSample, Outputs, flatten_levels, stage_of
from .teacher_source import (
    build_trained,
    check_class_count,
    class_names,
    find_in_model_index,
    load_config,
)
from .teacher_view import ClassMap, Renormalize
from .utils import ConfigError, check_options, isolated_random_state

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
)
HEADS_THAT_RUN = {'rpn_head': 'rpn', 'bbox_head': 'dense'}
"""The part of the teacher's outputs that makes a head run."""


def frozen_pass(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Run a teacher's computation without gradient or random numbers."""

    @functools.wraps(compute)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), isolated_random_state():
            return compute(*args, **kwargs)

    return call


class TeacherOutputs:
    """The teacher's view of a batch; each part is computed when first read.

    A method that reads only features pays for backbone and neck alone.
    """

    def __init__(
        self,
        teacher: 'Teacher',
        inputs: Tensor,
        data_samples: Sequence[DetDataSample],
    ) -> None:
        self.model = teacher.model
        self.class_map = teacher.class_map
        self._outputs = Outputs(teacher.model, teacher.paths)
        self._outputs.note = (
            ' The teacher runs what methods read: backbone, neck, dense head '
            'or RPN, and the box heads of its RoI head.'
        )
        self.cache: dict[str, Any] = {}
        """What methods have derived in this step, for each other."""
        self._renormalize = teacher.renormalize
        self._inputs, self._data_samples = inputs, data_samples
        self._roi_results: dict[int, tuple[BoxSample, dict]] = {}
        self._roi_outputs: dict[int, Outputs] = {}

    @functools.cached_property
    @frozen_pass
    def maps(self) -> tuple[Tensor, ...]:
        """What the heads see: the neck's (or backbone's) levels."""
        inputs = self._renormalize(self._inputs, self._data_samples)
        with self._outputs.recording():
            return self.model.extract_feat(inputs)

    @functools.cached_property
    @frozen_pass
    def rpn(self) -> tuple[list[Tensor], list[Tensor]]:
        """Per level logits (B, A*c, H, W) and deltas (B, A*4, H, W)."""
        maps = self.maps
        with self._outputs.recording():
            scores, deltas = self.model.rpn_head(maps)[:2]
        return scores, deltas

    @functools.cached_property
    @frozen_pass
    def dense(self) -> Any:
        """What a one-stage detector's head returns for the maps."""
        maps = self.maps
        with self._outputs.recording():
            return self.model.bbox_head(maps)

    def features(
        self, path: str, student: Outputs, student_path: str | None = None
    ) -> tuple[Tensor, ...]:
        """The output of the module at ``path``, a tensor a level.

        Args:
            path: A module path; what lies in a head makes the head run.
            student: The student's step, whose RoIs the RoI head is given.
            student_path: The student's module that it is compared with. In
                one stage of a cascade, that stage's RoIs alone are given.

        Raises:
            TapError: If the module did not run.
        """
        part = path.partition('.')[0]
        if part != 'roi_head':
            getattr(self, HEADS_THAT_RUN.get(part, 'maps'))
            return self._outputs.features(path)
        stage = stage_of(student.model, student_path or '')
        stages = range(len(student.rois)) if stage is None else [stage]
        samples = [student.rois[stage] for stage in stages]
        for sample, stage in zip(samples, stages, strict=True):
            self.score_rois(sample, stage)
        return tuple(
            feature
            for sample in samples
            for feature in self._roi_outputs[id(sample)].features(path)
        )

    def score_anchors(self, sample: BoxSample) -> tuple[Tensor, Tensor]:
        """The teacher's RPN on the student's sampled anchors.

        Returns:
            Logits (N, 1 or 2) and deltas (N, 4) in the teacher's coding.
        """
        assert sample.index is not None
        scores, deltas = self.rpn
        channels = self.model.rpn_head.cls_out_channels
        return (
            flatten_levels(scores, channels)[sample.index],
            flatten_levels(deltas, 4)[sample.index],
        )

    def score_rois(
        self, sample: BoxSample, stage: int
    ) -> tuple[Tensor, Tensor | None]:
        """The teacher's RoI head on the student's RoIs, on its own features.

        Args:
            sample: The student's sampled RoIs, or those of a peer.
            stage: The student's stage; a teacher with fewer uses its last.

        Returns:
            Logits (N, K+1) and deltas (N, 4 or 4K) in the teacher's coding.
        """
        if id(sample) not in self._roi_results:
            self._run_roi_head(sample, stage)
        result = self._roi_results[id(sample)][1]
        return result['cls_score'], result['bbox_pred']

    @frozen_pass
    def _run_roi_head(self, sample: BoxSample, stage: int) -> None:
        roi_head = self.model.roi_head
        arguments: list[Any] = [self.maps, sample.boxes]
        if isinstance(roi_head.bbox_head, nn.ModuleList):
            arguments.insert(0, min(stage, len(roi_head.bbox_head) - 1))
        outputs = Outputs(self.model, self._outputs.paths)
        outputs.note = self._outputs.note
        with outputs.recording():
            result = roi_head._bbox_forward(*arguments)
        # With the sample itself, so that its id stays its own.
        self._roi_results[id(sample)] = (sample, result)
        self._roi_outputs[id(sample)] = outputs


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
        return TeacherOutputs(self, inputs, data_samples)

    def __deepcopy__(self, memo: dict[int, Any]) -> 'Teacher':
        return self  # frozen: copies of the student share it

    def blank(self, run: Callable[[Any, Iterable[str]], Outputs]) -> Outputs:
        """The network's outputs for a blank image, from ``run``."""
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
            holds more than weights.
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
    return Teacher(
        model,
        classes,
        student=student,
        student_classes=student_classes,
        paths=paths,
    )
