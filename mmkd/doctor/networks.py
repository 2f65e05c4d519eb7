"""What the other networks see, in which mode, and with which classes."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mmkd.data.checkpoint_file import load_checkpoint_file
from mmkd.data.class_names import spelling
from mmkd.detectors.blank import image_channels
from mmkd.detectors.facts import box_class_names
from mmkd.detectors.pixels import flips, mean_std, pad_value
from mmkd.detectors.record import intercepted, replaced
from mmkd.detectors.source import check_class_count, class_names, load_config
from mmkd.engine.classes import training_classes
from mmkd.engine.hooks.teacher_check import evaluate_teacher
from mmkd.errors import ConfigError
from mmkd.teachers.build import descriptions
from mmkd.teachers.class_map import ClassMap
from mmkd.teachers.frozen import FrozenDetector
from mmkd.teachers.several import log_name
from mmkd.utils import isolated_random_state

from .patient import Patient
from .report import Report, some, table
from .weights import resolved

PIXEL_TOLERANCE = 1e-2
"""For normalised values: far above rounding, far below a wrong mean."""
DIVISOR = 'pad divisor'


def check_precision(runner: Any, images: int, report: Report) -> None:
    """Report metrics on the first validation images.

    They are those of each teacher, and of the student where it starts from a
    detector.
    """
    networks = runner.distiller.networks
    if not networks:
        return
    if runner.cfg.get('val_dataloader') is None:
        raise ConfigError('--eval needs a val_dataloader and val_evaluator.')
    images = min(images, len(runner.val_dataloader.dataset))
    detectors: dict[str, Any] = dict(networks)
    if runner._load_from is not None:
        names = next(iter(networks.values())).class_map.student
        detectors['student'] = SimpleNamespace(
            model=runner.distiller.student, class_map=ClassMap(names, names)
        )
    for name, each in detectors.items():
        mode = each.model.training
        each.model.eval()
        with isolated_random_state():
            metrics = evaluate_teacher(runner, each, images)
        each.model.train(mode)
        shown = '  '.join(f'{k}: {v:.4g}' for k, v in metrics.items())
        report.say(
            name.capitalize(),
            f'on {images} validation images: {shown or "none"}',
        )
        report.values[name] = {k: float(v) for k, v in metrics.items()}
        if name != 'student' and not any(
            value > 0 for value in metrics.values()
        ):
            report.find(
                f'the {name} detects nothing on {images} validation images: '
                'its checkpoint, classes, channel order or mean and std are '
                'wrong, or it is untrained.'
            )
    _check_lead(report, list(networks))


def _check_lead(report: Report, teachers: Sequence[str]) -> None:
    """Check that teachers are better than what the student starts from."""
    start = report.values.get('student', {})
    for name in teachers:
        theirs = report.values[name]
        metric = next((k for k in start if k in theirs), None)
        if metric is not None and theirs[metric] < start[metric]:
            report.find(
                f'the {name} is worse than what the student starts from '
                f'(load_from): {metric} is {theirs[metric]:.3g}, that of the '
                f'student {start[metric]:.3g}. Give a better teacher, or '
                'swap the two.',
                'warns',
            )


# ------------------------------------------------------------------- classes


def check_classes(runner: Any, report: Report) -> None:
    """Report how classes are matched, and whether that is assumed."""
    distiller = runner.distiller
    dataset = runner.train_loop.dataloader.dataset
    names = training_classes(dataset)
    if names is not None:
        _note(report, check_class_count, distiller.student, names)
        names = box_class_names(distiller.student, names)
    described = descriptions(runner.cfg.distillation.get('teacher'))
    for name, teacher in distiller.networks.items():
        of_one = f'{name}: ' if len(distiller.networks) > 1 else ''
        report.say('Classes', f'{of_one}{teacher.class_map}')
        _check_left_out(name, teacher.class_map, report)
        _check_teacher_classes(name, teacher, names, report)
        _check_sources(name, described[name], teacher, report)
    for label, other in distiller.teacher.each().items():
        if not other.networks:
            report.say('Classes', f'{log_name(label)}: {other.class_map}')
            _check_left_out(log_name(label), other.class_map, report)


def _check_left_out(name: str, classes: ClassMap, report: Report) -> None:
    """Name the classes that only one of the two networks has."""
    if left_out := classes.unmatched:
        report.find(
            f'the {name} teaches nothing about {len(left_out)} of the '
            f"student's {len(classes.student)} classes: "
            f'{", ".join(left_out)}. Of its own, the student has not: '
            f'{", ".join(classes.unused) or "none"}. Name pairs that mean '
            'the same in its class_map, or in class_aliases for all teachers.',
            'warns',
        )
    elif unused := classes.unused:
        report.find(
            f"{len(unused)} of the {name}'s {len(classes.teacher)} classes "
            f'are none of the student: {", ".join(unused)}.',
            'notes',
        )


def _check_teacher_classes(
    name: str,
    teacher: FrozenDetector,
    names: tuple[str, ...] | None,
    report: Report,
) -> None:
    classes = teacher.class_map
    _note(
        report,
        check_class_count,
        teacher.model,
        classes.teacher,
        f'the {name}',
    )
    if names is not None and tuple(classes.student) != names:
        report.find(
            'the classes of the class map are not those of the training '
            f'data: {names} in the data, {tuple(classes.student)} in the map.'
        )
    indices = classes.student_index.tolist(), classes.teacher_index.tolist()
    pairs = [
        (classes.student[s], teacher.classes[t])
        for s, t in zip(*indices, strict=True)
    ]
    wrong = [
        f'{ours} to {theirs}'
        for ours, theirs in pairs
        if spelling(ours) != spelling(theirs)
        and classes.by_hand.get(ours) != theirs
    ]
    aligned = tuple(zip(classes.student, teacher.classes, strict=False))
    same = len(classes.student) == len(teacher.classes)
    if wrong or classes.identical != (same and tuple(pairs) == aligned):
        report.find(
            'the class map does not join equal names: '
            f'{some(wrong) or "it takes different lists for identical"}.'
        )


def _note(report: Report, check: Any, *arguments: Any) -> None:
    try:
        check(*arguments)
    except ConfigError as error:
        report.find(str(error))


def _check_sources(
    name: str, cfg: Any, teacher: FrozenDetector, report: Report
) -> None:
    """Compare the names in the teacher's checkpoint and in its config."""
    options = resolved(cfg)
    config = load_config(options['config'])
    config.merge_from_dict(dict(options.get('cfg_options') or {}))
    described = class_names({}, config)
    meta: dict[str, Any] = {}
    if options.get('checkpoint'):
        trust = bool(options.get('trust_checkpoint'))
        content = load_checkpoint_file(
            options['checkpoint'], trust=trust, lazily=True
        )
        meta = content.get('meta') or {}
    recorded = class_names(meta, type(config)(dict(model={})))
    if described is None and recorded is None:
        report.find(
            f"neither the {name}'s checkpoint nor its config names its "
            "classes; the student's are assumed. Name them through "
            'test_dataloader.dataset.metainfo=dict(classes=...) in its '
            'config.',
            'warns',
        )
    elif described and recorded and described != recorded:
        differ = [
            f'{i}: {a} / {b}'
            for i, (a, b) in enumerate(zip(recorded, described, strict=False))
            if a != b
        ]
        report.find(
            f"the {name}'s checkpoint was trained on {len(recorded)} "
            f'classes, its config has {len(described)} or another order '
            f'(checkpoint / config: {some(differ)}). The names in the '
            'checkpoint are used; give the config it was trained with.',
            'warns',
        )


# -------------------------------------------------------------------- pixels


@contextmanager
def watched(patient: Patient) -> Iterator[None]:
    """Check what enters each network's backbone, and in which mode."""
    seen: dict[str, list[tuple[Tensor, list[str]]]] = {}
    aside: dict[str, list[tuple[Tensor, list[str]]]] = {}
    unlabelled = patient.distiller.unlabelled
    with ExitStack() as stack:
        if unlabelled is not None:
            losses = functools.partial(
                _set_aside, unlabelled.losses, seen, aside
            )
            stack.enter_context(replaced(unlabelled, 'losses', losses))
        for name, model in patient.networks.items():
            seen[name], aside[name] = [], []
            record = functools.partial(_record, model, seen[name])
            stack.enter_context(intercepted(model.backbone, 'forward', record))
        yield
    _describe_pixels(patient, {n: [x for x, _ in s] for n, s in seen.items()})
    for name, model in patient.networks.items():
        if not (seen[name] or aside[name]):
            patient.report.find(
                f'the {name} never ran: no method reads it in a step.',
                'warns',
            )
        _check_pixels(patient, name, model, [x for x, _ in seen[name]])
        runs = seen[name] + aside[name]
        active = [mode for _, modes in runs for mode in modes]
        if name in patient.distiller.networks and active:
            patient.report.find(
                f'the {name} ran with {len(set(active))} modules in '
                f'training mode ({some(list(dict.fromkeys(active)))}): '
                'dropout, DropPath or batch statistics are active. Put the '
                'whole network in eval mode.',
                'warns',
            )


def _set_aside(
    losses: Callable[..., Any],
    seen: Mapping[str, list[tuple[Tensor, list[str]]]],
    aside: Mapping[str, list[tuple[Tensor, list[str]]]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Set aside what networks see of unlabelled images.

    Their pixels are not those of the batch that is examined.
    """
    before = {name: len(runs) for name, runs in seen.items()}
    result = losses(*args, **kwargs)
    for name, runs in seen.items():
        aside[name].extend(runs[before[name] :])
        del runs[before[name] :]
    return result


def _record(
    model: nn.Module,
    seen: list[tuple[Tensor, list[str]]],
    _: Any,
    inputs: Tensor,
    *__: Any,
    **___: Any,
) -> None:
    modes = [
        f'{name} ({type(module).__name__})'
        for name, module in model.named_modules()
        if module.training
    ]
    seen.append((inputs.detach().clone(), modes))


def _describe_pixels(
    patient: Patient, seen: Mapping[str, Sequence[Tensor]]
) -> None:
    """Report how each network wants its pixels, and what it was given."""
    ours = preprocessing(patient.student)
    rows = [['network', *ours, 'its batch']]
    rows.append(['student', *ours.values(), '-'])
    for name, model in patient.networks.items():
        theirs = preprocessing(model)
        given = _given(patient.inputs, seen[name])
        if not seen[name] and patient.distiller.unlabelled is not None:
            given = 'unlabelled images alone'
        if seen[name] and theirs[DIVISOR] != ours[DIVISOR]:
            # The batch keeps its size; only its content is converted.
            given += f', padded to multiples of {ours[DIVISOR]}'
        rows.append([name, *theirs.values(), given])
    patient.report.say('Pixels', *table(rows))
    # Upright, networks side by side fit a terminal.
    upright = list(zip(*rows, strict=True))
    patient.report.fold('Pixels', *table(upright))


def preprocessing(model: Any) -> dict[str, str]:
    """Return what a data preprocessor does with images, in words."""
    preprocessor = model.data_preprocessor
    channels = image_channels(model)
    order = 'RGB' if flips(preprocessor) else 'BGR'
    mean, std = (
        ' '.join(f'{v:.6g}' for v in values.tolist())
        for values in mean_std(preprocessor)
    )
    return {
        'mean': mean,
        'std': std,
        'channels': order if channels == 3 else str(channels),
        'pad value': f'{pad_value(preprocessor):g}',
        DIVISOR: str(getattr(preprocessor, 'pad_size_divisor', 1)),
    }


def _given(ours: Tensor, seen: Sequence[Tensor]) -> str:
    """Return how the student's batch was changed for a network."""
    if not seen:
        return 'none, it never ran'
    same = all(x.shape == ours.shape and x.equal(ours.to(x)) for x in seen)
    return "the student's, as it is" if same else 'converted'


def _check_pixels(
    patient: Patient, name: str, model: Any, seen: list[Tensor]
) -> None:
    """Compare with what the network's own preprocessor makes of the batch."""
    raw = copy.deepcopy(patient.raw)
    data = model.data_preprocessor(raw, training=False)
    expected, ours = data['inputs'], patient.inputs
    height, width = (
        min(a, b)
        for a, b in zip(expected.shape[2:], ours.shape[2:], strict=True)
    )
    expected = expected[..., :height, :width]
    for inputs in seen:
        if inputs.shape != ours.shape:
            patient.report.say(
                'Pixels', f'{name:<9} ran on {tuple(inputs.shape)}, unchecked'
            )
            continue
        inputs = inputs[..., :height, :width]
        if not _close(inputs, expected):
            patient.report.find(
                f'the {name} sees other pixels than it was trained on: '
                + _cause(inputs, expected, ours[..., :height, :width])
            )


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a.float() - b.float()).abs().max() <= PIXEL_TOLERANCE)


def _cause(seen: Tensor, expected: Tensor, student: Tensor) -> str:
    if _close(seen.flip(1), expected):
        return 'its channels are in the reverse order.'
    if _close(seen, student):
        return "the student's mean, std or channel order, not its own."
    worst = (seen.float() - expected.float()).abs().max()
    return (
        'they are not those of its own data_preprocessor (largest '
        f'difference {worst:.3g}).'
    )


# --------------------------------------------------------------------- modes


def check_modes(patient: Patient) -> None:
    """Check that teachers are frozen and answer the same twice."""
    distiller, report = patient.distiller, patient.report
    trained = {
        id(p)
        for group in patient.runner.optim_wrapper.optimizer.param_groups
        for p in group['params']
    }
    for name, teacher in distiller.networks.items():
        named = list(teacher.model.named_parameters())
        for what, names in (
            ('requires a gradient', [n for n, p in named if p.requires_grad]),
            ('is in the optimiser', [n for n, p in named if id(p) in trained]),
        ):
            if names:
                report.find(f'the {name} {what}: {some(names)}.', 'warns')
        view = []
        for seed in range(2):
            with isolated_random_state(seed):
                view.append(teacher.view(patient.batch).maps)
        if any(not torch.equal(a, b) for a, b in zip(*view, strict=True)):
            report.find(
                f'the {name} answers differently to the same batch: '
                'something random is active in it.',
                'warns',
            )
    own = distiller.named_parameters() if distiller.networks else ()
    lost = [n for n, p in own if p.requires_grad and id(p) not in trained]
    if lost:
        report.find(
            f'the optimiser does not train {len(lost)} parameters of the '
            f'methods ({some(lost)}).',
            'warns',
        )
