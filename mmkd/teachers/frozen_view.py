"""What a frozen detector makes of the student's batch."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from mmkd.detectors.record import BoxSample, Outputs, flatten_levels, stage_of
from mmkd.utils import isolated_random_state

if TYPE_CHECKING:
    from .frozen import Teacher

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
        self._renormalize, self._speed = teacher.renormalize, teacher.speed
        self._inputs, self._data_samples = inputs, data_samples
        self.asked = self.hits = 0
        """Outputs of single images asked of the cache, and found there."""
        self._roi_results: dict[int, tuple[BoxSample, dict]] = {}
        self._roi_outputs: dict[int, Outputs] = {}

    @functools.cached_property
    @frozen_pass
    def maps(self) -> tuple[Tensor, ...]:
        """What the heads see: the neck's (or backbone's) levels."""
        inputs = self._renormalize(self._inputs, self._data_samples)
        with self._running(self._outputs):
            maps = self.model.extract_feat(self._speed.entering(inputs))
        return self._speed.leaving(maps)

    @functools.cached_property
    @frozen_pass
    def rpn(self) -> tuple[list[Tensor], list[Tensor]]:
        """Per level logits (B, A*c, H, W) and deltas (B, A*4, H, W)."""
        maps = self.maps
        with self._running(self._outputs):
            scores, deltas = self.model.rpn_head(maps)[:2]
        return self._speed.leaving((scores, deltas))

    @functools.cached_property
    @frozen_pass
    def dense(self) -> Any:
        """What a one-stage detector's head returns for the maps."""
        maps = self.maps
        with self._running(self._outputs):
            dense = self.model.bbox_head(maps)
        return self._speed.leaving(dense)

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
            return self._speed.leaving(self._outputs.features(path))
        stage = stage_of(student.model, student_path or '')
        stages = range(len(student.rois)) if stage is None else [stage]
        samples = [student.rois[stage] for stage in stages]
        for sample, stage in zip(samples, stages, strict=True):
            self.score_rois(sample, stage)
        return self._speed.leaving(
            tuple(
                feature
                for sample in samples
                for feature in self._roi_outputs[id(sample)].features(path)
            )
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
        with self._running(outputs):
            result = roi_head._bbox_forward(*arguments)
        # With the sample itself, so that its id stays its own.
        self._roi_results[id(sample)] = (sample, self._speed.leaving(result))
        self._roi_outputs[id(sample)] = outputs

    @contextmanager
    def _running(self, outputs: Outputs) -> Iterator[None]:
        """Record what the network computes within, as its options say."""
        with outputs.recording(), self._speed.computing(self._inputs.device):
            yield
