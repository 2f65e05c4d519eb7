"""How a method's gradient relates to the task's over a few real steps."""

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from mmkd.core.gradients import gradient
from mmkd.core.reach import wrappers_of
from mmkd.engine.hooks.telemetry import norm

from .losses import trained_parts
from .patient import Patient, Step
from .report import table

STEPS = 8
"""Of the optimiser, on as many batches."""
AT_LEAST, SECONDS = 3, 20.0
"""Fewer steps where they take longer, but not fewer than these."""
RATE = 0.1
"""Of the learning rate after its warm-up: the student moves, and stays whole
where the run would have warmed up for long."""
EXPLODED = 1000.0
"""A method whose gradient stays larger than the task's by this ratio stops
the training."""
LARGE, SMALL = 10.0, 1e-3
"""A larger or smaller ratio is a warning."""
SECTION = 'Balance'


@dataclass
class Course:
    """What a few steps of the optimiser show."""

    ratios: dict[str, list[float]] = field(default_factory=dict)
    """Each method's gradient over the task's, step by step. One with a
    single loss goes by the name of that."""
    left: list[float] = field(default_factory=list)
    """The share of the task's gradient that clipping leaves, because of the
    methods."""
    finite: bool = True
    seconds: float = 0.0


def check_balance(patient: Patient) -> None:
    """Take a few real steps, and judge each method by the last of them."""
    course = _course(patient)
    count = max(map(len, course.ratios.values()), default=0)
    if not count:
        return
    rows = [['', "gradient over the task's", f'after {count} steps']]
    for name, ratios in course.ratios.items():
        rows.append([name, f'{ratios[0]:.3g}', f'{_last(ratios):.3g}'])
    lines = [
        f'{count} steps of the optimiser with {RATE:g} of its learning rate, '
        f'in {course.seconds:.1f} s',
        *table(rows),
    ]
    if course.left and _last(course.left) < 1:
        lines.append(
            f'clip_grad leaves {_last(course.left):.2g} of the gradient that '
            'it would leave to the task alone'
        )
    patient.report.say(SECTION, *lines)
    patient.report.values['balance'] = course.ratios
    for name, ratios in course.ratios.items():
        _judge(patient, name, ratios, course)


def _last(values: Sequence[float]) -> float:
    """Return the median of the second half."""
    return statistics.median(values[len(values) // 2 :])


def _judge(
    patient: Patient, name: str, ratios: Sequence[float], course: Course
) -> None:
    ratio, find = _last(ratios), patient.report.find
    if not 0 < ratio < math.inf or SMALL <= ratio <= LARGE:
        return
    methods: Any = patient.distiller.methods
    weight = methods[name.partition('.')[0]].loss_weight
    factor = f'{ratio:.3g} times' if ratio >= 1 else f'{ratio:.1g} of'
    what = f"its gradient is {factor} the task's"
    if not math.isclose(ratio, ratios[0], rel_tol=0.5):
        what += f' after {len(ratios)} steps, {ratios[0]:.3g} times at first'
    if course.left and (left := _last(course.left)) < 0.5 and ratio > LARGE:
        what += f", and clip_grad leaves 1/{1 / left:.0f} of the task's own"
    remedy = (
        f'loss_weight={weight / ratio:.1g} (now {weight:g}) would bring it to '
        "about the task's gradient, or mmkd.GradientBalanceHook holds its "
        'share (`mmkd distill --balance .3`).'
    )
    if ratio < SMALL:
        find(f'{name} hardly teaches: {what}. {remedy}', 'warns')
    elif ratio > EXPLODED or not course.finite:
        end = '' if course.finite else ', then losses are no longer finite'
        find(f'{name} explodes: {what}{end}. {remedy}')
    else:
        find(f'{name} outweighs the task: {what}. {remedy}', 'warns')


def _course(patient: Patient) -> Course:
    """Train a few steps, and put everything back."""
    wrappers = wrappers_of(patient.runner.optim_wrapper)
    groups = [g for w in wrappers for g in w.optimizer.param_groups]
    rates = [group['lr'] for group in groups]
    patient.restore(patient.student)
    try:
        for group in groups:
            group['lr'] = RATE * group.get('initial_lr', group['lr'])
        return _taken(patient, wrappers)
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group['lr'] = rate
        for wrapper in wrappers:
            wrapper.optimizer.state.clear()
            wrapper.optimizer.zero_grad(set_to_none=True)
        patient.restore(patient.student)


def _whole_batches(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield batches for ever, without the incomplete ones at the end.

    In such a batch, few images decide, or normalisation fails.
    """
    size = None
    while True:
        for batch in loader:
            size = size or len(batch['inputs'])
            if len(batch['inputs']) == size:
                yield batch


def _taken(patient: Patient, wrappers: Sequence[Any]) -> Course:
    course, start = Course(), time.monotonic()
    batches = _whole_batches(patient.runner.train_loop.dataloader)
    parameters = [p for part in trained_parts(patient).values() for p in part]
    for number in range(STEPS):
        seconds = time.monotonic() - start
        if number >= AT_LEAST and seconds > SECONDS:
            break
        step = patient.on(next(batches)).next_step()
        if not bool(step.total.isfinite()):
            course.finite = False
            break
        scale, whole = _measure(patient, step, parameters, course)
        for parameter, each in zip(parameters, whole, strict=True):
            parameter.grad = each
        for wrapper in wrappers:
            _clip(wrapper, scale, course)
            wrapper.optimizer.step()
    course.seconds = time.monotonic() - start
    return course


def _measure(
    patient: Patient,
    step: Step,
    parameters: Sequence[Any],
    course: Course,
) -> tuple[float, list[Tensor | None]]:
    """Add a step to the course.

    Returns:
        The norm of the task's gradient in the student, and the gradient of
        all losses.
    """
    student = patient.student
    count = len(trained_parts(patient)['student'])
    task = gradient(step.task.values(), parameters, student)
    scale = float(norm(task[:count]))
    for name, losses in step.distilled.items():
        own = gradient(losses.values(), parameters, student)[:count]
        if losses and scale:
            ratio = float(norm(own)) / scale
            name = next(iter(losses)) if len(losses) == 1 else name
            course.ratios.setdefault(name, []).append(ratio)
    return scale, gradient([step.total], parameters, student)


def _clip(wrapper: Any, scale: float, course: Course) -> None:
    """Clip as the run does, and note what that leaves to the task."""
    options: Mapping[str, Any] = (
        getattr(wrapper, 'clip_grad_kwargs', None) or {}
    )
    most = options.get('max_norm')
    if not most or not scale:
        return
    held = [p for g in wrapper.optimizer.param_groups for p in g['params']]
    whole = float(clip_grad_norm_(held, **options))
    course.left.append(
        min(1.0, float(most) / whole) / min(1.0, float(most) / scale)
    )
