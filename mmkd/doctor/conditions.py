"""What a loss must not depend on: padding, order of classes, precision."""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.core.gradients import gradient, student_parameters
from mmkd.core.reach import wrappers_of
from mmkd.data.batch import Batch
from mmkd.detectors.facts import class_layers
from mmkd.detectors.record import StepRecord, intercepted, replaced
from mmkd.engine.hooks.telemetry import norm
from mmkd.teachers.class_map import ClassMap
from mmkd.teachers.frozen import FrozenDetector
from mmkd.utils import isolated_random_state

from .losses import trained_parts
from .patient import SEED, Patient, cloned
from .report import some

SECTION = 'Conditions'
MARGIN = 8
"""How far beyond an image the convolutions of a method may see, in cells."""
TOLERANCE = 1e-2
"""A loss that changes by a larger share depends on what was changed."""
OVER_POSITIONS = (nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm)


class Recording:
    """The outputs of a step, on which methods can run again."""

    def __init__(self, patient: Patient, inputs: Tensor, samples: Any) -> None:
        distiller = patient.distiller
        patient.restore(patient.student)
        self.batch = Batch(inputs, samples)
        self.methods: dict[str, Any] = {
            name: (method, weight)
            for name, (method, weight) in distiller.active_methods().items()
            if method.learns_from == 'teacher'
            and not (method.steers or method.only_unlabelled)
        }
        self.states = {n: cloned(m) for n, (m, _) in self.methods.items()}
        self.student = StepRecord(
            patient.student, distiller._paths('student_paths')
        )
        with isolated_random_state(SEED), self.student.recording():
            type(patient.student).loss(
                patient.student, inputs, copy.deepcopy(samples)
            )
        self.teacher = distiller.teacher.view(self.batch)

    def losses(self, only: str | None = None) -> dict[str, float]:
        """Return every method's losses, each with the same random numbers."""
        return {k: float(v.detach()) for k, v in self._losses(only).items()}

    def gradients(self) -> dict[str, list[Tensor | None]]:
        """Return the gradients of the losses in the student."""
        student, losses = self.student.model, self._losses()
        parameters = student_parameters(student)
        return {
            k: gradient([v], parameters, student) for k, v in losses.items()
        }

    def _losses(self, only: str | None = None) -> dict[str, Tensor]:
        self.student.cache.clear()
        for view in (*self.teacher.each().values(), *self.teacher.parts()):
            view.cache.clear()
        losses = {}
        for name, (method, weight) in self.methods.items():
            if only not in (None, name):
                continue
            # Some methods count their steps, to draw other numbers in each.
            method.load_state_dict(self.states[name])
            with isolated_random_state(SEED):
                found = method.forward(self.student, self.teacher, self.batch)
            for part, loss in found.items():
                losses[f'{name}.loss_{part}'] = weight * loss
        return losses

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change everything that is recorded, without computing it anew."""
        student = self.student
        student._fired = mapped(change, student._fired)
        vars(student).pop('anchors', None)
        if vars(student).get('rois'):
            for sample in student.rois:
                sample.logits = mapped(change, sample.logits)
                sample.deltas = mapped(change, sample.deltas)
        for teacher in self.teacher.parts():
            parts = vars(teacher)
            for name in ('maps', 'rpn', 'raw_dense'):
                if name in parts:
                    parts[name] = mapped(change, parts[name])
            for name in ('features', 'score_rois'):
                read = getattr(teacher, name)
                setattr(teacher, name, functools.partial(_read, change, read))


def _read(
    change: Callable[[Tensor], Tensor],
    read: Callable[..., Any],
    *arguments: Any,
    **options: Any,
) -> Any:
    return mapped(change, read(*arguments, **options))


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return nested containers with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {k: mapped(change, v) for k, v in value.items()}
    if hasattr(value, '_fields'):  # a named tuple
        return type(value)(*(mapped(change, v) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(mapped(change, v) for v in value)
    return value


def differing(
    a: Mapping[str, float], b: Mapping[str, float], tolerance: float
) -> list[str]:
    """Return the names of the losses that differ, with both values."""
    return [
        f'{name} ({a[name]:.4g} and {b[name]:.4g})'
        for name in a
        if not abs(a[name] - b[name])
        <= tolerance * max(abs(a[name]), abs(b[name]))
    ]


def distance(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float:
    """Return the norm of a difference of gradients, relative to the first."""
    difference = [
        x if y is None else y if x is None else x - y
        for x, y in zip(a, b, strict=True)
    ]
    return float(norm(difference) / norm(a).clamp(min=1e-30))


# ------------------------------------------------------------------- padding


def check_padding(patient: Patient) -> None:
    """Check that the padding of tapped maps changes no loss.

    One image is padded to twice its width. What both networks gave for the
    padding is overwritten beyond the reach of a few convolutions.
    """
    if not patient.distiller.teacher.each():
        return
    value = float(getattr(patient.student.data_preprocessor, 'pad_value', 0))
    width = patient.inputs.shape[-1]
    inputs = F.pad(patient.inputs[:1], (0, width), value=value)
    sample = copy.deepcopy(patient.samples[0])
    sample.set_metainfo(dict(batch_input_shape=tuple(inputs.shape[2:])))
    recording = Recording(patient, inputs, [sample])
    if not recording.methods:
        return
    clean = recording.losses()
    padded = sample.metainfo.get('pad_shape', sample.img_shape)
    overwrite = functools.partial(
        _overwrite, inputs.shape[-1], max(padded[1], sample.img_shape[1])
    )
    recording.change(overwrite)
    judged, depends = [], False
    for name in recording.methods:
        before = {k: v for k, v in clean.items() if _of(k) == name}
        with _normalising(patient) as fired:
            changed = differing(before, recording.losses(name), TOLERANCE)
        if changed and fired:
            patient.report.say(
                SECTION,
                f'padding: {name} is not judged, because it runs layers of '
                f'the networks that span positions ({some(sorted(fired))})',
            )
            continue
        judged.append(name)
        if changed:
            depends = True
            patient.report.find(
                f'{some(changed)}: what lies on the padding changes the '
                'loss, so it depends on which images share a batch. Leave '
                'positions on padding out of sums, means and softmax.',
                'warns',
            )
    if judged and not depends:
        patient.report.say(SECTION, 'padding changes no loss')


def _of(loss: str) -> str:
    """Return the method that a loss belongs to, by its name."""
    return loss.partition('.')[0]


def _overwrite(full: int, width: int, maps: Tensor) -> Tensor:
    """Put noise beyond ``width`` of ``full`` pixels of maps (1, C, H, W)."""
    if maps.dim() != 4 or len(maps) != 1 or maps.shape[-1] < 2:
        return maps
    first = math.ceil(width * maps.shape[-1] / full) + MARGIN
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(maps.shape, generator=generator).to(maps)
    result = maps.clone()
    result[..., first:] += 5 * (1 + maps.detach().std()) * noise[..., first:]
    return result


@contextmanager
def _normalising(patient: Patient) -> Iterator[set[str]]:
    """Collect the names of layers over positions that run within."""
    fired: set[str] = set()

    def record(name: str, *_: Any) -> None:
        fired.add(name)

    with ExitStack() as stack:
        for model in (
            patient.stock,
            patient.student,
            *patient.networks.values(),
        ):
            for name, module in model.named_modules():
                if isinstance(module, OVER_POSITIONS):
                    note = functools.partial(record, name)
                    stack.enter_context(intercepted(module, 'forward', note))
        yield fired


# ---------------------------------------------------------- order of classes


def check_class_order(patient: Patient) -> None:
    """Check that the order of the teacher's classes changes nothing.

    This is checked only where student and teacher differ in their classes;
    where they agree, a method may compare class by class.
    """
    for name, teacher in patient.distiller.networks.items():
        if not teacher.class_map.identical:
            _check_class_order(patient, name, teacher)


def _check_class_order(
    patient: Patient, teacher_name: str, teacher: FrozenDetector
) -> None:
    recording = Recording(patient, patient.inputs, patient.samples)
    if not recording.methods:
        return
    plain = recording.gradients()
    count = len(teacher.classes)
    order = torch.arange(count).roll(1)
    layers = class_layers(teacher.model, count)
    if not layers:
        return
    classes = ClassMap(
        teacher.class_map.student,
        [teacher.classes[i] for i in order],
        teacher.class_map.by_hand,
        teacher.class_map.aliases,
    ).to(patient.device)
    with ExitStack() as stack:
        for layer in layers:
            for name in ('weight', 'bias'):
                value = getattr(layer, name)
                if value is not None:
                    stack.enter_context(_permuted(value, order))
        stack.enter_context(replaced(teacher, 'class_map', classes))
        recording.teacher = patient.distiller.teacher.view(recording.batch)
        renamed = recording.gradients()
    # Gradients and not losses are compared, because a student that has not
    # learnt anything yet is as far from one class as from another.
    changed = [
        name
        for name in plain
        if distance(plain[name], renamed[name]) > TOLERANCE
    ]
    if changed:
        patient.report.find(
            f'{some(changed)}: the order in which the {teacher_name} lists '
            'its classes changes the loss. Compare classes through '
            'teacher.class_map, by name.'
        )
    else:
        patient.report.say(
            SECTION, f"the {teacher_name}'s order of classes is free"
        )


@contextmanager
def _permuted(parameter: Tensor, order: Tensor) -> Iterator[None]:
    """Reorder the classes in a classifier's weight or bias."""
    kept = parameter.detach().clone()
    classes = len(order)
    anchors = max(len(kept) // classes, 1)
    scores = kept[: anchors * classes].unflatten(0, (anchors, classes))
    with torch.no_grad():
        parameter[: anchors * classes] = scores[:, order].flatten(0, 1)
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(kept)


# ----------------------------------------------------------------- precision


def check_half_precision(patient: Patient) -> None:
    """Check that losses and gradients are finite in half precision."""
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix('torch.')
        where = ''
        if _plain_runs(patient, dtype):
            broken = _broken_step(patient, dtype)
        else:
            # MMCV's operators on the CPU are an example.
            broken = _broken_recording(patient, dtype)
            where = f'the plain step cannot run in it on {patient.device.type}'
        if broken is None:
            patient.report.say(SECTION, f'{name}: not judged, {where}')
        elif broken:
            patient.report.find(
                f'{some(broken)}: NaN or infinite in {name}. Compute sums, '
                'squares, exponentials and divisions of the method in '
                'float32 (.float()).',
                'stops' if _trains_in_half(patient) else 'warns',
            )
        else:
            how = 'all losses are finite, no gradient is NaN'
            how += f' (of halved outputs; {where})' if where else ''
            patient.report.say(SECTION, f'{name}: {how}')


def _trains_in_half(patient: Patient) -> bool:
    return any(
        'Amp' in type(wrapper).__name__
        for wrapper in wrappers_of(patient.runner.optim_wrapper)
    )


def _plain_runs(patient: Patient, dtype: torch.dtype) -> bool:
    patient.restore(patient.stock)
    try:
        with torch.no_grad(), torch.autocast(patient.device.type, dtype):
            step = patient._step(patient.stock)
    except Exception:  # operators without it raise various errors
        return False
    return bool(step.total.isfinite())


def _broken_step(patient: Patient, dtype: torch.dtype) -> list[str] | None:
    with torch.autocast(patient.device.type, dtype):
        step = patient.distilled_step()
    losses = {k: v for d in step.distilled.values() for k, v in d.items()}
    return _broken(patient, losses)


def _broken_recording(
    patient: Patient, dtype: torch.dtype
) -> list[str] | None:
    """Judge a step by halved outputs; None where no method can be judged."""
    if not patient.distiller.teacher.each():
        return None
    recording = Recording(patient, patient.inputs, patient.samples)
    if not recording.methods:
        return None
    recording.losses()  # this computes what the methods read of the teacher
    recording.change(lambda t: t.to(dtype) if t.is_floating_point() else t)
    with torch.autocast(patient.device.type, dtype):
        losses = recording._losses()
    return _broken(patient, losses)


def _broken(patient: Patient, losses: Mapping[str, Tensor]) -> list[str]:
    """Return the losses that are not finite, or whose gradient is NaN."""
    trained = [p for part in trained_parts(patient).values() for p in part]
    broken = []
    for name, loss in losses.items():
        gradients = gradient([loss], trained, patient.student)
        if not loss.isfinite():
            broken.append(name)
        elif any(g is not None and g.isnan().any() for g in gradients):
            broken.append(f'the gradient of {name}')
    return broken
