"""The usual teacher: a frozen detector of MMDetection."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from mmengine.structures import InstanceData
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.detectors.blank import blank_pass
from mmkd.detectors.dense import DenseOutputs, read_dense
from mmkd.detectors.facts import DetectorFacts, read_facts, stage_of
from mmkd.detectors.passes import (
    detect,
    run_dense_head,
    run_roi_head,
    run_rpn,
)
from mmkd.detectors.record import RoIOutputs, StepRecord, flatten_levels
from mmkd.utils import isolated_random_state

from .class_map import ClassMap
from .record_view import RecordView
from .renormalize import Renormalize
from .speed import Speed, eagerly
from .view import (
    DENSE,
    DETECTIONS,
    FEATURES,
    NETWORK,
    ROIS,
    RPN,
    BoxScores,
    Teacher,
    TeacherView,
)

HEADS_THAT_RUN = {'rpn_head': 'rpn', 'bbox_head': 'raw_dense'}
"""The part of the view whose reading makes a head run."""


class ViewCache(Protocol):
    """Something that already knows parts of a view."""

    def open_view(
        self, teacher: 'FrozenDetector', batch: Batch
    ) -> 'FrozenView':
        """Return the teacher's view of a batch, read through the cache."""


class FrozenDetector(Teacher):
    """A frozen detector, its class map and its normalisation.

    Args:
        model: The detector with its weights.
        classes: Its class names.
        student: The student's detector, for the normalisation.
        student_classes: The student's class names.
        paths: Module paths that methods read.
        class_map: The teacher's names of some of the student's classes; see
            :class:`~mmkd.teachers.class_map.ClassMap`.
        class_aliases: Names of classes that mean the same.
    """

    gives = frozenset({FEATURES, DENSE, RPN, ROIS, DETECTIONS, NETWORK})

    def __init__(
        self,
        model: Any,
        classes: Sequence[str],
        *,
        student: Any,
        student_classes: Sequence[str],
        paths: Iterable[str] = (),
        class_map: Mapping[str, str | None] | None = None,
        class_aliases: Mapping[str, str] | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.classes = tuple(classes)
        self.paths = tuple(paths)
        self.speed = Speed()
        self.class_map = ClassMap(
            student_classes, classes, class_map, class_aliases
        )
        self.renormalize = Renormalize(
            student.data_preprocessor, model.data_preprocessor
        )
        self.cache: ViewCache | None = None
        """Keeps what the network has computed, if there is a cache."""
        self.rebuild: Callable[[Mapping[str, Tensor]], None] | None = None
        """Loads other weights in the way in which the teacher was built."""

    @property
    def networks(self) -> Mapping[str, Any]:
        return {'teacher': self}

    def view(self, batch: Batch) -> 'FrozenView':
        if self.cache is None:
            return FrozenView(self, batch)
        return self.cache.open_view(self, batch)

    def blank(self, device: torch.device) -> TeacherView:
        with eagerly(self.speed):
            record = blank_pass(self.model, self.paths, device)
        return RecordView(record, self.class_map)

    def to(self, device: torch.device) -> 'FrozenDetector':
        self.model.to(device)
        self.class_map.to(device)
        return self

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        if self.rebuild is None:
            super().set_weights(weights)
        else:
            self.rebuild(weights)

    def describe(self) -> str:
        differs = 'differs' if self.renormalize.needed else 'is equal'
        return (
            f'{type(self.model).__name__}, its classes are {self.class_map}, '
            f'its normalisation {differs}'
        )


def frozen_pass(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Run a teacher's computation without gradient or random numbers."""

    @functools.wraps(compute)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), isolated_random_state():
            return compute(*args, **kwargs)

    return call


class FrozenView(TeacherView):
    """The frozen detector's view of a batch.

    A method that reads only features pays only for backbone and neck.
    """

    def __init__(self, teacher: FrozenDetector, batch: Batch) -> None:
        self.model = teacher.model
        self.class_map = teacher.class_map
        self.cache: dict[str, Any] = {}
        self._record = StepRecord(teacher.model, teacher.paths)
        self._record.note = (
            ' The teacher runs what methods read: backbone, neck, dense head '
            'or RPN, and the box heads of its RoI head.'
        )
        self._renormalize, self._speed = teacher.renormalize, teacher.speed
        self._batch = batch
        self._roi_results: dict[int, tuple[RoIOutputs, dict]] = {}
        self._roi_records: dict[int, StepRecord] = {}

    @functools.cached_property
    def facts(self) -> DetectorFacts:
        return read_facts(self.model)

    @functools.cached_property
    @frozen_pass
    def maps(self) -> tuple[Tensor, ...]:
        batch = self._batch
        inputs = self._renormalize(batch.inputs, batch.data_samples)
        with self._running(self._record):
            maps = self.model.extract_feat(self._speed.entering(inputs))
        return self._speed.leaving(maps)

    @functools.cached_property
    @frozen_pass
    def rpn(self) -> tuple[list[Tensor], list[Tensor]]:
        """Logits (B, A*c, H, W) and deltas (B, A*4, H, W) of each level."""
        maps = self.maps
        with self._running(self._record):
            found = run_rpn(self.model, maps)
        return self._speed.leaving(found)

    @functools.cached_property
    @frozen_pass
    def raw_dense(self) -> Any:
        """What a one-stage detector's head returns for the maps."""
        maps = self.maps
        with self._running(self._record):
            found = run_dense_head(self.model, maps)
        return self._speed.leaving(found)

    @property
    def dense(self) -> DenseOutputs:
        if 'dense' not in self.cache:
            assert self.facts.dense is not None
            self.cache['dense'] = read_dense(self.facts.dense, self.raw_dense)
        return self.cache['dense']

    @functools.cached_property
    @frozen_pass
    def detections(self) -> list[InstanceData]:
        """The network's own detections, with labels of its own classes."""
        maps, batch = self.maps, self._batch
        with self._speed.computing(batch.inputs.device):
            return detect(self.model, maps, batch.inputs, batch.data_samples)

    def features(
        self, path: str, student: StepRecord, student_path: str | None = None
    ) -> tuple[Tensor, ...]:
        """Return the output of the module at ``path``, a tensor per level.

        Reading a module in a head makes the head run. In one stage of a
        cascade, a RoI head gets only the RoIs of that stage.

        Raises:
            TapError: If the module did not run.
        """
        part = path.partition('.')[0]
        if part != 'roi_head':
            getattr(self, HEADS_THAT_RUN.get(part, 'maps'))
            return self._speed.leaving(self._record.features(path))
        stage = stage_of(student.model, student_path or '')
        stages = range(len(student.rois)) if stage is None else [stage]
        samples = [student.rois[stage] for stage in stages]
        for sample, stage in zip(samples, stages, strict=True):
            self.score_rois(sample, stage)
        return self._speed.leaving(
            tuple(
                feature
                for sample in samples
                for feature in self._roi_records[id(sample)].features(path)
            )
        )

    def score_anchors(self, sample: RoIOutputs) -> BoxScores:
        facts = self.facts.rpn
        assert sample.index is not None
        assert facts is not None
        scores, deltas = self.rpn
        return BoxScores(
            flatten_levels(scores, facts.columns)[sample.index],
            flatten_levels(deltas, 4)[sample.index],
            facts.coder,
        )

    def score_rois(self, sample: RoIOutputs, stage: int) -> BoxScores:
        """Score the student's RoIs with the teacher's RoI head and features.

        Args:
            sample: The student's sampled RoIs, or those of a peer.
            stage: The student's stage. A teacher with fewer uses its last.
        """
        if id(sample) not in self._roi_results:
            self._run_roi_head(sample, stage)
        result = self._roi_results[id(sample)][1]
        rois = self.facts.rois
        coder = rois[min(stage, len(rois) - 1)].coder
        return BoxScores(result['cls_score'], result['bbox_pred'], coder)

    @frozen_pass
    def _run_roi_head(self, sample: RoIOutputs, stage: int) -> None:
        record = StepRecord(self.model, self._record.paths)
        record.note = self._record.note
        maps = self.maps
        with self._running(record):
            result = run_roi_head(self.model, maps, sample.boxes, stage)
        # The sample is kept, so that no other one gets its id.
        self._roi_results[id(sample)] = (sample, self._speed.leaving(result))
        self._roi_records[id(sample)] = record

    @contextmanager
    def _running(self, record: StepRecord) -> Iterator[None]:
        """Record what the network computes within, with its options."""
        device = self._batch.inputs.device
        with record.recording(), self._speed.computing(device):
            yield
