"""Several teachers that speak with one voice: the mean of their outputs."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from mmdet.structures import DetDataSample
from torch import Tensor

from mmkd.detectors.record import BoxSample, Outputs, box_heads
from mmkd.detectors.two_stage import same_coder, uses_sigmoid
from mmkd.errors import ConfigError, TapError

from .frozen import Teacher
from .frozen_view import TeacherOutputs

CLASSES = 'the classes that only one knows'
REMEDY = 'Teachers that differ teach one by one, in a list: teacher=[...].'


class MeanTeacher:
    r"""One teacher whose predictions are the mean of several teachers'.

    .. math::
        z = \frac{1}{n} \sum_t z_t

    of all that the heads predict: class logits, deltas, logits of bins and
    of centerness. The mean is one of logits, not of probabilities: that is
    the normalised geometric mean of softmax probabilities, the geometric
    mean of the odds of sigmoid ones, whatever the temperature of a method.
    (Heads that return probabilities, such as TOOD's, are averaged as they
    are.) A list of teachers, in contrast, has the same gradient in
    :class:`~mmkd.methods.kd.KD` as the arithmetic mean of probabilities.

    It fits methods that read predictions: KD, DKD, DIST, LD, soft labels and
    Faster R-CNN's without its hint. Features of different networks do not
    correspond, so they have no mean.

    Args:
        teachers: Label to teacher. They have the same classes, in any
            order, and heads whose numbers mean the same.

    Raises:
        ConfigError: If there is only one, or they differ; says in what.
    """

    paths: tuple[str, ...] = ()

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        self.teachers = dict(teachers)
        self.names = [f'teacher_{label}' for label in teachers]
        self.first, *others = self.teachers.values()
        if not others:
            raise ConfigError(
                'distillation.teacher: a mean takes at least two teachers, '
                'got one. Describe it without "mean".'
            )
        ours = _facts(self.first)
        for name, other in zip(self.names[1:], others, strict=True):
            theirs = _facts(other)
            for what in dict.fromkeys((*ours, *theirs)):
                self._check_same(name, what, ours.get(what), theirs.get(what))

    @property
    def model(self) -> Any:
        """The first network: its head tells how to read the predictions."""
        return self.first.model

    @property
    def class_map(self) -> Any:
        return self.first.class_map

    @property
    def networks(self) -> dict[str, Teacher]:
        """The teachers by their names in logs."""
        return dict(zip(self.names, self.teachers.values(), strict=True))

    def __call__(
        self, inputs: Tensor, data_samples: Sequence[DetDataSample]
    ) -> 'MeanOutputs':
        """View the student's batch (B, 3, H, W); nothing runs yet."""
        return MeanOutputs(self, inputs, data_samples)

    def __deepcopy__(self, memo: dict[int, Any]) -> 'MeanTeacher':
        return self  # frozen, as its teachers

    def to(self, device: torch.device | str) -> 'MeanTeacher':
        """Move the networks to ``device``, in place."""
        for teacher in self.teachers.values():
            teacher.to(device)
        return self

    def blank(self, run: Callable[[Any, Iterable[str]], Outputs]) -> Outputs:
        """The first network's outputs for a blank image.

        Raises:
            ConfigError: If those of another one have other shapes.
        """
        outputs = [t.blank(run) for t in self.teachers.values()]
        ours = _shapes(outputs[0])
        for name, other in zip(self.names[1:], outputs[1:], strict=True):
            self._check_same(name, 'the output shapes', ours, _shapes(other))
        return outputs[0]

    def _check_same(
        self, name: str, what: str, ours: Any, theirs: Any
    ) -> None:
        if ours != theirs:
            if what == CLASSES:
                ours, theirs = sorted(ours - theirs), sorted(theirs - ours)
            raise ConfigError(
                f'distillation.teacher: {self.names[0]} and {name} have no '
                f'mean, they differ in {what}: {ours} and {theirs}. {REMEDY}'
            )


class MeanOutputs:
    """The mean of the teachers' views of a batch; see TeacherOutputs."""

    def __init__(
        self,
        teacher: MeanTeacher,
        inputs: Tensor,
        data_samples: Sequence[DetDataSample],
    ) -> None:
        self.model, self.class_map = teacher.model, teacher.class_map
        self.views: list[TeacherOutputs] = [
            each(inputs, data_samples) for each in teacher.teachers.values()
        ]
        first = self.class_map.teacher
        self.orders = [
            _order(first, view.class_map.teacher, inputs.device)
            for view in self.views
        ]
        self.cache: dict[str, Any] = {}
        """What methods have derived in this step, for each other."""

    @property
    def rpn(self) -> tuple[list[Tensor], list[Tensor]]:
        """Per level logits (B, A*c, H, W) and deltas (B, A*4, H, W)."""
        if 'mean rpn' not in self.cache:
            self.cache['mean rpn'] = mean([view.rpn for view in self.views])
        return self.cache['mean rpn']

    @property
    def dense(self) -> Any:
        """What a one-stage detector's head returns, classes in one order."""
        if 'mean dense' not in self.cache:
            self.cache['mean dense'] = mean(
                [
                    _dense_in_order(self.model.bbox_head, view.dense, order)
                    for view, order in zip(
                        self.views, self.orders, strict=True
                    )
                ]
            )
        return self.cache['mean dense']

    def score_anchors(self, sample: BoxSample) -> tuple[Tensor, Tensor]:
        """The mean RPN on the student's sampled anchors."""
        return mean([view.score_anchors(sample) for view in self.views])

    def score_rois(
        self, sample: BoxSample, stage: int
    ) -> tuple[Tensor, Tensor | None]:
        """The mean RoI head on the student's RoIs, each on its features."""
        return mean(
            [
                _rois_in_order(*view.score_rois(sample, stage), order)
                for view, order in zip(self.views, self.orders, strict=True)
            ]
        )

    @property
    def maps(self) -> NoReturn:
        self.features()

    def features(self, *_: Any) -> NoReturn:
        """Features have no mean.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            'the features of several networks do not correspond and have no '
            f'mean. {REMEDY}'
        )


def mean(values: Sequence[Any]) -> Any:
    """The mean of equally nested tensors; None where all are None."""
    first = values[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.stack(list(values)).mean(0)
    return type(first)(mean(parts) for parts in zip(*values, strict=True))


# ----------------------------------------------------------- order of classes


@functools.lru_cache
def _order(
    first: tuple[str, ...], other: tuple[str, ...], device: torch.device
) -> Tensor | None:
    """The other's index of each of the first's classes; None for the same."""
    if first == other:
        return None
    index = [other.index(name) for name in first]
    return torch.tensor(index, device=device)


def _dense_in_order(head: Any, raw: Any, order: Tensor | None) -> Any:
    """A dense head's output with its classes in another order."""
    if order is None:
        return raw
    if hasattr(head, 'num_attrib'):  # YOLOv3: box and object come first
        before, width = 5, head.num_attrib
    else:
        before, width = 0, head.cls_out_channels
    maps = [
        _columns(level.unflatten(1, (-1, width)), before, order).flatten(1, 2)
        for level in raw[0]
    ]
    return (maps, *raw[1:])


def _rois_in_order(
    logits: Tensor, deltas: Tensor | None, order: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A RoI head's output with its classes in another order."""
    if order is None:
        return logits, deltas
    if deltas is not None and deltas.shape[1] > 4:
        deltas = deltas.unflatten(1, (-1, 4))[:, order].flatten(1)
    return _columns(logits[:, None], 0, order)[:, 0], deltas


def _columns(values: Tensor, before: int, order: Tensor) -> Tensor:
    """(N, A, c, ...) with the columns of classes in another order.

    ``before`` columns come first; a background's comes last, if there is one.
    """
    after = before + len(order)
    return torch.cat(
        [
            values[:, :, :before],
            values[:, :, before + order],
            values[:, :, after:],
        ],
        dim=2,
    )


# ------------------------------------------------------------------ agreement


class _Coder:
    """A box coder that equals one that gives the same deltas."""

    def __init__(self, coder: Any) -> None:
        self.coder = coder

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Coder) and same_coder(
            self.coder, other.coder
        )

    def __repr__(self) -> str:
        return f'{type(self.coder).__name__} {vars(self.coder)}'


def _facts(teacher: Teacher) -> dict[str, Any]:
    """What the numbers that a detector's heads predict depend on."""
    model = teacher.model
    facts: dict[str, Any] = {CLASSES: set(teacher.classes)}
    for part in ('rpn_head', 'bbox_head'):
        head = getattr(model, part, None)
        facts[f'the {part}'] = type(head).__name__
        if hasattr(head, 'prior_generator'):
            for what, value in _dense_facts(head).items():
                facts[f'{what} of the {part}'] = value
    heads = box_heads(model)
    facts['the number of RoI stages'] = len(heads)
    for stage, head in enumerate(heads):
        for what, value in {
            'the classifier': 'sigmoid' if uses_sigmoid(head) else 'softmax',
            'reg_class_agnostic': head.reg_class_agnostic,
            'the box coder': _Coder(head.bbox_coder),
        }.items():
            facts[f'{what} of RoI stage {stage}'] = value
    return facts


def _dense_facts(head: Any) -> dict[str, Any]:
    generator = head.prior_generator
    places = [(1, 1)] * generator.num_levels
    sigmoid = getattr(head, 'use_sigmoid_cls', True)
    activated = getattr(getattr(head, 'loss_cls', None), 'activated', False)
    return {
        'the classifier': 'sigmoid' if sigmoid else 'softmax',
        'the scores': 'probabilities' if activated else 'logits',
        'the strides': [tuple(stride) for stride in generator.strides],
        'the first priors': [
            [[round(x, 2) for x in prior] for prior in level.tolist()]
            for level in generator.grid_priors(places, device='cpu')
        ],
        'the box coder': _Coder(getattr(head, 'bbox_coder', None)),
        'reg_max': getattr(head, 'reg_max', None),
        'anchor_type': getattr(head, 'anchor_type', None),
    }


def _shapes(outputs: Outputs) -> dict[str, list[tuple[int, ...]]]:
    """Of what the standard heads gave, those that ran."""
    shapes = {}
    for path in ('rpn_head', 'bbox_head'):
        try:
            found = outputs.features(path)
        except TapError:
            continue
        shapes[path] = [tuple(tensor.shape) for tensor in found]
    return shapes
