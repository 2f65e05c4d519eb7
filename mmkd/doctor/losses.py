"""How large each loss is, what it trains, and which way it pulls."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmkd.core.gradients import gradient
from mmkd.core.reach import cause, moved_parameters, optimizers_of
from mmkd.engine.hooks.telemetry import cosine, norm

from .patient import Patient, Step
from .report import some, table

MORE_BATCHES = 3
"""How many more batches are tried for a loss that is 0 on the first."""
UNLABELLED = '.unlabelled_loss_'
"""What the names of losses on images without labels have in them."""


def check_losses(patient: Patient) -> None:
    """Check each loss's value, what it trains, and which way it pulls."""
    step = patient.distilled_step()
    report = patient.report
    parts = trained_parts(patient)
    of_task = _gradients(step.task.values(), parts, patient.student)
    task = of_task['student']
    scale = float(norm(task))
    shown: dict[str, dict[str, float]] = {
        'task': {
            'value': sum(float(x.detach()) for x in step.task.values()),
            'gradient': scale,
            'cosine': 1.0,
        }
    }
    reached = {'task': _reached(of_task)}
    for losses in step.distilled.values():
        for name, loss in losses.items():
            gradients = _gradients([loss], parts, patient.student)
            own = gradients['student']
            shown[name] = {
                'value': float(loss.detach()),
                'gradient': float(norm(own)),
                'cosine': float(cosine(own, task)),
            }
            reached[name] = _reached(gradients)
    images, _, height, width = patient.inputs.shape
    rows = [['loss', 'value', 'gradient', 'cosine with the task', 'trains']]
    for name, row in shown.items():
        values = [f'{v:.4g}' for v in row.values()]
        rows.append([name, *values, ', '.join(reached[name])])
    report.say('Losses', f'of {images} images, {height}x{width}', *table(rows))
    report.values['losses'] = shown
    for name, method in patient.distiller.methods.items():
        if method.steers:
            report.say('Losses', f"{name} steers the student's own losses")
    _check_reached(patient, step)
    _judge(patient, shown, reached)
    _check_student_learns(patient, step, reached)


def trained_parts(patient: Patient) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of each trained part, the student first.

    Those of the student are the ones that the optimiser changes.
    """
    distiller = patient.distiller
    optimizers = optimizers_of(patient.runner.optim_wrapper)
    parts = {'student': moved_parameters(patient.student, optimizers)}
    modules: dict[str, nn.Module] = {
        name: peer.model for name, peer in distiller.peers.items()
    }
    for name, module in {**modules, 'own layers': distiller.methods}.items():
        parts[name] = [p for p in module.parameters() if p.requires_grad]
    return parts


def _gradients(
    losses: Iterable[Tensor],
    parts: Mapping[str, Sequence[nn.Parameter]],
    student: nn.Module,
) -> dict[str, list[Tensor | None]]:
    """Compute the gradient of a sum of losses in each part, in one pass."""
    every = [p for part in parts.values() for p in part]
    found = iter(gradient(losses, every, student))
    return {name: [next(found) for _ in part] for name, part in parts.items()}


def _reached(gradients: Mapping[str, Sequence[Tensor | None]]) -> list[str]:
    """Return the parts in which losses have a gradient."""
    return [name for name, each in gradients.items() if float(norm(each))]


def _judge(
    patient: Patient,
    shown: Mapping[str, Mapping[str, float]],
    reached: Mapping[str, Sequence[str]],
) -> None:
    find = patient.report.find
    dead: dict[str, str] = {}
    for name, row in shown.items():
        if not all(map(_finite, (row['value'], row['gradient']))):
            find(f'{name}: its value or gradient is NaN or infinite.')
        elif (
            name != 'task'
            and (
                row['value'] == 0 or not _teaches(patient, name, reached[name])
            )
            and _stays_zero(patient, name)
        ):
            dead[name] = 'value' if row['value'] == 0 else 'gradient'
    for name, what in dead.items():
        method = name.partition('.')[0]
        others = {n for n in shown if n.partition('.')[0] == method} - {*dead}
        find(
            f'{name} teaches nothing: its {what} is exactly 0 on '
            f'{1 + MORE_BATCHES} batches.{_doubt(patient, name, what)}',
            # On few images a sound threshold may leave nothing.
            'warns' if others or UNLABELLED in name else 'stops',
        )


def _teaches(patient: Patient, name: str, reached: Sequence[str]) -> bool:
    """Return whether a loss reaches what it is for.

    Where networks train together, a loss may teach another network than the
    student, or layers of the method.
    """
    method: Any = patient.distiller.methods[name.partition('.')[0]]
    return (
        bool(reached)
        if method.learns_from == 'peers'
        else 'student' in reached
    )


def _doubt(patient: Patient, name: str, what: str) -> str:
    if what == 'gradient':
        return f' {_cause(patient, name.partition(".")[0])}'
    if not patient.distiller.teacher.each():
        return ''
    if UNLABELLED in name:
        return (
            ' The teacher finds no object in these images that the method '
            'takes: look at its threshold, and at what --eval 100 shows.'
        )
    return (
        ' If the teacher is trained (--eval 100 shows its metrics), none of '
        'its predictions fits an object of these images as the method asks.'
    )


def _check_student_learns(
    patient: Patient, step: Step, reached: Mapping[str, Sequence[str]]
) -> None:
    """Check that some of a method's losses reach the student."""
    for method, losses in step.distilled.items():
        anything = any(reached[name] for name in losses)
        if anything and not any('student' in reached[x] for x in losses):
            why = ''
            if patient.distiller.methods[method].learns_from == 'peers':
                why = f' {_cause(patient, method)}'
            patient.report.find(
                f'{method} teaches others, but not the student: none of its '
                f'{len(losses)} losses has a gradient there.{why}'
            )


def _cause(patient: Patient, method: str) -> str:
    """Return why a method's losses do not reach the student."""
    methods: Any = patient.distiller.methods
    parameters = trained_parts(patient)['student']
    return cause(methods[method], patient.student, parameters)


def _finite(value: float) -> bool:
    return value == value and abs(value) != float('inf')


def _stays_zero(patient: Patient, name: str) -> bool:
    """Return whether a loss or its gradient is 0 on other batches, too."""
    loader = iter(patient.runner.train_loop.dataloader)
    parts = trained_parts(patient)
    for _ in range(MORE_BATCHES):
        raw = next(loader, None)
        if raw is None:
            break
        step = patient.on(raw).distilled_step()
        loss = {k: v for d in step.distilled.values() for k, v in d.items()}
        if name in loss and _teaches(
            patient,
            name,
            _reached(_gradients([loss[name]], parts, patient.student)),
        ):
            return False
    return True


def _check_reached(patient: Patient, step: Step) -> None:
    """Check that every trainable parameter gets a gradient."""
    named = {
        name: p
        for name, p in patient.student.named_parameters()
        if p.requires_grad
    }
    every = list(named.values())
    gradients = gradient([step.total], every, patient.student)
    without = [
        name
        for name, each in zip(named, gradients, strict=True)
        if each is None
    ]
    if not without:
        return
    patient.report.say(
        'Gradient', f'{len(without)} parameters get none: {some(without)}'
    )
    plain = patient.plain_step()
    idle: set[str] = set()
    if plain is not None:
        stock = dict(patient.stock.named_parameters())
        trained = {k: p for k, p in stock.items() if p.requires_grad}
        every = list(trained.values())
        got = gradient([plain.total], every, patient.stock)
        idle = {
            k for k, each in zip(trained, got, strict=True) if each is None
        }
    new = [name for name in without if name not in idle]
    if new:
        patient.report.find(
            f'{len(new)} trainable parameters get no gradient ({some(new)}): '
            'distributed training would wait for them forever.',
            'warns',
        )
