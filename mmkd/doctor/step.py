"""One step: what is compared, what weight 0 leaves, and what it costs."""

import contextlib
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkd.core.each_teacher import FromEach
from mmkd.core.gradients import gradient
from mmkd.detectors.record import StepRecord, intercepted
from mmkd.errors import TapError
from mmkd.methods import CrossKD
from mmkd.methods.feature_base import FeatureMethod
from mmkd.utils import ATTACHED

from .patient import Patient, Step, cloned, own_state
from .report import some, table

ROUNDS = 3


# ---------------------------------------------------------------------- taps

COLUMNS = (
    *('method', 'network', 'tap', 'level'),
    *('channels', 'size', 'stride', 'adapter'),
)


def describe_taps(patient: Patient) -> None:
    """Report each level of a tapped module, with the layer after it."""
    calls: dict[str, tuple] = {}
    methods = _single_methods(patient)
    with ExitStack() as stack:
        for name, method in methods.items():
            record = functools.partial(_keep, calls, name)
            stack.enter_context(intercepted(method, 'forward', record))
        patient.distilled_step()
    rows = [
        [name, *row]
        for name, (student, teacher) in calls.items()
        for row in _rows(methods[name], student, teacher, patient)
    ]
    if rows:
        patient.report.say('Taps', *table([COLUMNS, *rows]))
        patient.report.fold('Taps', *table(_folded(rows)))
    for name, method in patient.distiller.methods.items():
        layers = [m for m in method.modules() if own_parameters(m)]
        if layers:
            kinds = [type(layer).__name__ for layer in layers]
            parts = (f'{kinds.count(k)} {k}' for k in dict.fromkeys(kinds))
            count = sum(p.numel() for p in method.parameters())
            text = f'{name} trains {", ".join(parts)}: {count} parameters'
            patient.report.say('Taps', text)
            patient.report.fold('Taps', text)


def _folded(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return a row for each tap, of all its levels."""
    taps: dict[tuple[str, ...], list[Sequence[str]]] = {}
    for row in rows:
        taps.setdefault(tuple(row[:3]), []).append(row[3:])
    head = ['method', 'network', 'tap', 'levels', 'channels', 'strides']
    return [
        [*head, 'adapter'],
        *(
            [
                *(*tap, str(len(levels)), _unique(levels, 1)),
                *(_unique(levels, 3), _unique(levels, 4)),
            ]
            for tap, levels in taps.items()
        ),
    ]


def _unique(levels: Sequence[Sequence[str]], column: int) -> str:
    return ' '.join(dict.fromkeys(level[column] for level in levels))


def _single_methods(patient: Patient) -> dict[str, Any]:
    """Return the methods; those of several teachers are listed singly."""
    methods: dict[str, Any] = {}
    for name, method in patient.distiller.methods.items():
        if isinstance(method, FromEach):
            for label, each in method.of_teacher.items():
                methods[f'{name}, teacher_{label}'] = each
        else:
            methods[name] = method
    return methods


def _keep(
    calls: dict[str, tuple],
    name: str,
    _: Any,
    student: StepRecord,
    teacher: Any,
    *__: Any,
) -> None:
    calls[name] = (student, teacher)


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that belong to no child."""
    return list(module.parameters(recurse=False))


def _rows(
    method: Any, student: StepRecord, teacher: Any, patient: Patient
) -> Iterator[list[str]]:
    """Return the rows of one method, without its name."""
    width = patient.inputs.shape[-1]
    paths = [*dict.fromkeys(method.student_paths)]
    if not paths:
        for path in student.fired:
            shape = _shape(student.features(path), width)
            yield ['student', path, 'all', *shape, '-']
    between = adapters(method, student, teacher) if teacher.each() else {}
    for path in paths:
        read = functools.partial(student.features, path)
        for level, shape in _levels(read, width):
            text = between.get((path, level), '-')
            yield ['student', path, level, *shape, text]
    for number, path in enumerate(
        method.teacher_paths if teacher.each() else ()
    ):
        beside = paths[number] if number < len(paths) else None
        read = functools.partial(teacher.features, path, student, beside)
        for level, shape in _levels(read, width):
            yield ['teacher', path, level, *shape, '-']
    for (name, peer), path in itertools.product(
        student.peers.items(), method.peer_paths
    ):
        for level, shape in _levels(
            functools.partial(peer.features, path), width
        ):
            yield [name, path, level, *shape, '-']


def _levels(
    read: Callable[[], tuple[Tensor, ...]], width: int
) -> list[tuple[str, list[str]]]:
    """Return the number and shape of each level that a module gave."""
    try:
        features = read()
    except TapError:
        return [('-', ['did not run', '-', '-'])]
    return [(str(i), _shape([f], width)) for i, f in enumerate(features)]


def _shape(features: Sequence[Tensor], width: int) -> list[str]:
    """Describe features of images ``width`` wide."""
    maps = [f for f in features if f.dim() == 4]
    if not maps:
        shapes = [str(tuple(f.shape)) for f in features]
        return [some(shapes), '-', '-']
    channels = dict.fromkeys(str(m.shape[1]) for m in maps)
    sizes = dict.fromkeys(f'{m.shape[2]}x{m.shape[3]}' for m in maps)
    strides = dict.fromkeys(f'{width / m.shape[3]:.3g}' for m in maps)
    return [' '.join(channels), ' '.join(sizes), ' '.join(strides)]


def adapters(
    method: Any, student: StepRecord, teacher: Any
) -> dict[tuple[str, str], str]:
    """Return what a method has between a student's and a teacher's level.

    Returns:
        The layer in words, by path and level of the student.
    """
    method = getattr(method, 'hint', None) or method
    if isinstance(method, CrossKD):
        found = {}
        taps = method.tapped_pairs(student, teacher)
        for tower, layer in method.adapters.items():
            ours, theirs = taps[tower]
            pairs = zip(
                student.features(ours),
                teacher.features(theirs, student),
                strict=True,
            )
            for level, (s, t) in enumerate(pairs):
                found[ours, str(level)] = _in_words(layer, s, t)
        return found
    return (
        _level_adapters(method, student, teacher)
        if isinstance(method, FeatureMethod)
        else {}
    )


def _level_adapters(
    method: Any, student: StepRecord, teacher: Any
) -> dict[tuple[str, str], str]:
    path = method.source
    ours = student.features(path)
    theirs = teacher.features(method.teacher_source, student, path)
    layers = method.adapters
    if not method.adaptable:
        own = [m for k, m in method.named_children() if k != 'adapters']
        layers = next((m for m in own if len(m) == len(layers)), layers)
    found = {(path, str(level)): 'not used' for level in range(len(ours))}
    for level, other, layer in zip(
        method.levels or range(len(ours)),
        method.teacher_levels or range(len(theirs)),
        layers,
        strict=True,
    ):
        text = _in_words(layer, ours[level], theirs[other])
        if level != other:
            text += f", to the teacher's level {other}"
        found[path, str(level)] = text
    return found


def _in_words(layer: nn.Module, student: Tensor, teacher: Tensor) -> str:
    """Describe the layer between two features, and their sizes."""
    text = 'identity'
    if not isinstance(layer, nn.Identity):
        widths = f'{student.shape[1]} -> {teacher.shape[1]}'
        text = f'{type(layer).__name__} {widths}'
    size = teacher.shape[2:]
    if student.shape[2:] != size:
        text += f', resized to {"x".join(map(str, size))}'
    return text


# --------------------------------------------------------------- zero weight


def check_zero_weight(patient: Patient) -> None:
    """Check that a step with weight 0 is the stock student's, bit for bit."""
    if patient.distiller.alone:
        patient.report.say(
            'Zero weight', 'not checked: the student learns without labels'
        )
        return
    plain = patient.plain_step()
    if plain is None:
        return
    # Before the next step, which puts the weights back in place.
    reference = _signature(plain, patient.stock)
    again = patient.plain_step()
    assert again is not None
    noise = _difference(reference, _signature(again, patient.stock))[1]
    state = cloned(patient.stock)
    zero = patient.distilled_step(scale=0.0)
    found = _signature(zero, patient.student)
    after = own_state(patient.student)
    name, worst = _difference(reference, found)
    shown = 'bit for bit' if worst == 0 else f'up to {worst:.1e}'
    section = 'Zero weight'
    if worst > 10 * noise:
        patient.report.find(
            'with every method at weight 0 the step is not the plain one: '
            f'{name} differs by {worst:.2g} (relative). A method or the '
            'runner changes the student.',
            'warns',
        )
    else:
        patient.report.say(section, f'the plain step, {shown}')
    changed = [k for k in state if not torch.equal(state[k], after[k])]
    if changed and noise == 0:
        patient.report.find(
            'after a step at weight 0 these buffers differ from those of the '
            f'plain step: {some(changed)}.',
            'warns',
        )
    if not torch.equal(plain.random_state, zero.random_state):
        patient.report.find(
            'distillation draws from the global random numbers even at '
            "weight 0, so the student's samplers and dropout draw other "
            'numbers than in the plain run.',
            'warns',
        )
    if not patient.steers:
        _check_own_losses(patient, plain, 10 * noise)


def _check_own_losses(patient: Patient, plain: Step, allowed: float) -> None:
    """Check that the student's own losses are stock at full weight."""
    full = patient.distilled_step()
    name, worst = _difference(plain.task, full.task)
    if worst > allowed:
        patient.report.find(
            f"the student's own {name} changes by {worst:.2g} (relative) "
            'when methods are active, though none of them steers it: '
            'something draws random numbers before it or changes the '
            'student.',
            'warns',
        )


def _signature(step: Step, model: nn.Module) -> dict[str, Tensor]:
    """Return the student's losses and gradients, by name."""
    named = {
        k: p
        for k, p in model.named_parameters()
        if p.requires_grad and not k.startswith(f'{ATTACHED}.')
    }
    gradients = gradient([step.total], list(named.values()), model)
    return {
        **{k: v.detach() for k, v in step.task.items()},
        **{
            f'the gradient of {k}': g
            for k, g in zip(named, gradients, strict=True)
            if g is not None
        },
    }


def _difference(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> tuple[str, float]:
    """Return the entry that differs most, and its relative difference.

    Entries that only ``b`` has (losses of peers) are left out.
    """
    worst = ('', 0.0)
    for name, value in a.items():
        if name not in b or b[name].shape != value.shape:
            return name, float('inf')
        if torch.equal(value, b[name]):
            continue
        distance = (value - b[name]).float().norm()
        share = float(distance / value.float().norm().clamp(min=1e-12))
        if not share <= worst[1]:
            worst = (name, share)
    return worst


# ---------------------------------------------------------------------- cost


def check_cost(patient: Patient) -> None:
    """Report time and memory of the plain and the distilled step."""
    if patient.plain_step() is None:
        return
    runs: dict[str, Callable[[], Any]] = {
        'plain': patient.plain_step,
        'distilled': patient.distilled_step,
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in runs}
    memory = dict.fromkeys(runs, 0.0)
    for _ in range(ROUNDS):
        for kind, run in runs.items():
            reset_peak(patient.device)
            start = time.perf_counter()
            run().total.backward()
            if patient.device.type == 'cuda':
                torch.cuda.synchronize()
            seconds[kind].append(time.perf_counter() - start)
            memory[kind] = max(memory[kind], peak(patient.device))
            for model in (patient.stock, patient.student):
                model.zero_grad(set_to_none=True)
    times = {kind: statistics.median(s) for kind, s in seconds.items()}
    more = times['distilled'] / times['plain'] - 1
    patient.report.say(
        'Cost of forward and backward',
        f'time    plain {times["plain"]:.3f} s, distilled '
        f'{times["distilled"]:.3f} s ({more:+.0%})',
        f'memory  plain {memory["plain"]:.0f} MiB, distilled '
        f'{memory["distilled"]:.0f} MiB (the process, teacher loaded)',
    )
    patient.report.values['seconds'] = times
    patient.report.values['peak_mib'] = memory


def reset_peak(device: torch.device) -> None:
    """Start to measure the peak of memory anew (Linux, CUDA)."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')


def peak(device: torch.device) -> float:
    """Return MiB since :func:`reset_peak`, or 0 if they are unknown."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError):
        for line in Path('/proc/self/status').read_text().splitlines():
            if line.startswith('VmHWM:'):
                return int(line.split()[1]) / 2**10
    return 0.0
