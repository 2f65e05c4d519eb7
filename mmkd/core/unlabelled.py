"""Images without labels beside the stock training: who learns from them."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any, cast

from mmdet.structures import DetDataSample
from mmengine.logging import print_log
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmkd.data.batch import Batch
from mmkd.detectors.passes import loss_of
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError
from mmkd.teachers.seen import same_geometry, seen_objects, with_objects
from mmkd.teachers.view import DETECTIONS, Teacher, TeacherView
from mmkd.utils import check_options, isolated_random_state

from .method import Method

WHERE = 'distillation.unlabelled'
OPTIONS = (
    *('dataset', 'batch_size', 'num_workers', 'weak', 'strong'),
    *('weight', 'score_thr', 'alone'),
)
"""Those of the first line say what the batches are, and are read where the
training is set up (``mmkd.engine.unlabelled``)."""
BEFORE_HEADS = ('backbone', 'neck')


class Unlabelled:
    """The images without labels of a training, and who learns from them.

    Args:
        student: The student.
        methods: All methods by name.
        teacher: Their teacher.
        seed: Seeds the random numbers of the student's passes.
        weight: Factor of all losses on unlabelled images.
        score_thr: Detections of the teacher with at least this score are the
            objects of methods that read where the student finds some.
        alone: Whether the student learns from unlabelled images alone.
        options: What the batches are.

    Attributes:
        stream: Yields the batches, as the data loader gives them; whoever
            sets up the training sets it.
        learners: The names of the methods that learn from them.
        statistics: What methods and teacher log of the last step.

    Raises:
        ConfigError: If no method can learn from them.
    """

    def __init__(
        self,
        student: Any,
        methods: Mapping[str, nn.Module],
        teacher: Teacher,
        *,
        seed: int = 0,
        weight: float = 1.0,
        score_thr: float = 0.5,
        alone: bool = False,
        **options: Any,
    ) -> None:
        _check_number('weight', weight, math.inf)
        _check_number('score_thr', score_thr, 1.0)
        self.student, self.seed = student, seed
        self.weight, self.score_thr = weight, score_thr
        self.alone, self.options = bool(alone), options
        self.stream: Iterator[Any] | None = None
        self.statistics: dict[str, Tensor] = {}
        reasons = {
            name: why_not(cast(Method, method), teacher)
            for name, method in methods.items()
        }
        self.learners = [name for name, why in reasons.items() if not why]
        self._say(reasons)

    def _say(self, reasons: Mapping[str, str]) -> None:
        others = '; '.join(f'{n} {why}' for n, why in reasons.items() if why)
        if not self.learners:
            raise ConfigError(
                f'{WHERE}: no method learns from images without labels '
                f'({others}). Add one, such as pseudo=dict(type='
                "'mmkd.PseudoLabels'), or leave the unlabelled images out."
            )
        print_log(
            f'From the unlabelled images learn: {", ".join(self.learners)}'
            + (f'. Not: {others}' if others else ''),
            'current',
        )

    def next(
        self, active: Collection[str], step: int, epoch: int
    ) -> Batch | None:
        """Return the next batch if one of the active methods learns from it.

        Its images are normalised and padded as the student's are in its
        tests: no augmentation of whole batches takes part.
        """
        if self.stream is None or not any(n in active for n in self.learners):
            return None
        views = {
            key: Batch(step=step, epoch=epoch, **self._preprocessed(view))
            for key, view in next(self.stream).items()
        }
        strong = views.get('strong', views['weak'])
        return replace(strong, weak=views['weak'])

    def _preprocessed(self, view: dict[str, Any]) -> dict[str, Any]:
        return self.student.data_preprocessor(view, False)

    def losses(
        self,
        batch: Batch,
        active: Mapping[str, Method],
        record: StepRecord,
        teacher: Teacher,
        factor: Callable[[str], float],
    ) -> dict[str, dict[str, Tensor]]:
        """Return the losses of each method that learns from a batch.

        The student's pass has random numbers of its own (dropout, samplers),
        which depend on the seed and the step alone.

        Args:
            batch: What the student sees.
            active: The active methods.
            record: An empty record of the student.
            teacher: The teacher.
            factor: Says what a method's weight is multiplied by.

        Returns:
            By the name of a method its losses by name, with its weight and
            that of the unlabelled images.
        """
        learners = {n: active[n] for n in self.learners if n in active}
        assert batch.weak is not None
        view = teacher.view(batch.weak)
        if not same_geometry(batch):
            _check_geometry(learners)
        self.statistics = {}
        with isolated_random_state((self.seed + batch.step) % 2**32):
            batch = self._pass(batch, learners, record, view)
            found = {}
            for name, method in learners.items():
                kept, method.statistics = method.statistics, {}
                scale = factor(name) * self.weight
                found[name] = method(record, view, batch, scale)
                self._keep_statistics(name, method)
                method.statistics = kept
        return found

    def _pass(
        self,
        batch: Batch,
        learners: Mapping[str, Method],
        record: StepRecord,
        view: TeacherView,
    ) -> Batch:
        """Run the student as far as its methods read it.

        Returns:
            The batch, with the objects on which its heads have trained.
        """
        with record.recording():
            record.maps = self.student.extract_feat(batch.inputs)
            if any(map(_reads_heads, learners.values())):
                batch = replace(batch, data_samples=self._with(view, batch))
                loss_of(
                    self.student, record.maps, batch.inputs, batch.copies()
                )
        return batch

    def _with(self, view: TeacherView, batch: Batch) -> list[DetDataSample]:
        """Return the data samples with the teacher's confident detections.

        Of several teachers these are the first one's.
        """
        first = next(iter(view.each().values()))
        return with_objects(
            batch,
            [
                cast(InstanceData, each[each.scores >= self.score_thr])
                for each in seen_objects(first, batch)
            ],
        )

    def _keep_statistics(self, name: str, method: Method) -> None:
        """Keep what a method logs, beside what it logs of labelled images."""
        prefix = '' if method.only_unlabelled else 'unlabelled_'
        for key, value in method.statistics.items():
            self.statistics[f'{name}.{prefix}{key}'] = value


def build_unlabelled(
    options: Any,
    student: nn.Module,
    methods: Mapping[str, Method],
    teacher: Teacher,
    seed: int = 0,
) -> Unlabelled | None:
    """Return what a config says of unlabelled images; None if it has none.

    Args:
        options: ``distillation.unlabelled``. With weight 0 it is as if it
            were absent.
        student: The student.
        methods: The methods by name.
        teacher: Their teacher.
        seed: Seeds the random numbers of the student's passes.

    Raises:
        ConfigError: If an option is unknown, or a method has no images.
    """
    if options is not None:
        check_options_of(options)
        if options.get('weight', 1.0):
            built = dict(options)
            return Unlabelled(student, methods, teacher, seed=seed, **built)
        if options.get('alone'):
            raise ConfigError(
                f'{WHERE} has weight 0 and alone=True, so the student would '
                'learn nothing. Set a weight above 0, or leave alone out.'
            )
        return None
    for name, method in methods.items():
        if method.only_unlabelled:
            raise ConfigError(
                f'distillation.methods.{name} ({type(method).__name__}) '
                'learns from unlabelled images, and there are none. Add '
                "distillation.unlabelled=dict(dataset='FOLDER', "
                'batch_size=2).'
            )
    return None


def check_options_of(options: Any) -> None:
    """Check ``distillation.unlabelled`` of a config.

    Raises:
        ConfigError: If an option is missing or unknown.
    """
    if not isinstance(options, Mapping) or 'dataset' not in options:
        raise ConfigError(
            f'{WHERE} must be a dict with the "dataset" of the images, got '
            f"{options!r}. Example: dict(dataset='FOLDER', batch_size=2)."
        )
    check_options(WHERE, options, OPTIONS)


def why_not(method: Method, teacher: Teacher) -> str:
    """Say why a method cannot learn from unlabelled images; '' if it can."""
    if method.learns_from != 'teacher':
        return 'ties peers, which see labelled images alone'
    if method.needs_labels:
        return 'needs labels'
    gives = [each.gives for each in teacher.each().values()][:1]
    if method.reads_objects and DETECTIONS not in gives[0]:
        return (
            f"reads objects, which are the teacher's {DETECTIONS}, and the "
            'teacher gives none'
        )
    return ''


def _reads_heads(method: Method) -> bool:
    return method.reads_objects or any(
        path.partition('.')[0] not in BEFORE_HEADS
        for path in method.student_paths
    )


def _check_geometry(learners: Mapping[str, Method]) -> None:
    fixed = [name for name, m in learners.items() if not m.any_geometry]
    if fixed:
        raise ConfigError(
            f'{WHERE}.strong moves the pixels of the image, so that '
            f'{", ".join(fixed)} would compare different places. Leave '
            'resizes, flips, crops and other geometry to `weak`, or use '
            'methods that compare boxes only, such as mmkd.PseudoLabels.'
        )


def _check_number(name: str, value: Any, most: float) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 <= value <= most or value == math.inf:
        limits = 'at least 0' if most == math.inf else f'from 0 to {most:g}'
        raise ConfigError(
            f'{WHERE}.{name} must be a finite number, {limits}, got {value!r}.'
        )
