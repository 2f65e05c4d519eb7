"""Whether the teacher is one: its size, its weights, and whether it learnt."""

from typing import Any

import torch
from torch import nn

from mmkd.teachers.build import descriptions

from .patient import own_state
from .report import Report
from .weights import resolved

SMALLER = 0.9
"""A teacher with a smaller share of the student's parameters is a warning."""
NO_HEADS = ('backbone', 'neck', 'data_preprocessor')


def check_pair(runner: Any, report: Report) -> None:
    """Check that each teacher is larger, another, and trained."""
    distiller = runner.distiller
    described = descriptions(runner.cfg.distillation.get('teacher'))
    student = own_state(distiller.student)
    size = sum(
        p.numel()
        for k, p in distiller.student.named_parameters()
        if k in student
    )
    for name, teacher in distiller.networks.items():
        _check_size(name, teacher.model, distiller.student, size, report)
        own = teacher.model.state_dict()
        if own.keys() == student.keys() and all(
            own[k].shape == v.shape and torch.equal(own[k].cpu(), v.cpu())
            for k, v in student.items()
        ):
            report.find(
                f'the {name} and the student are the same network with the '
                'same weights: there is nothing to learn from it. Give the '
                'teacher the checkpoint of a better detector.',
                'warns',
            )
        if resolved(described[name]).get('checkpoint') and _is_fresh(
            teacher.model
        ):
            report.find(
                f"the {name}'s checkpoint seems untrained: every bias of its "
                'head is still one number, as it is before the first step. '
                '--eval 100 shows what it detects.',
                'warns',
            )


def _check_size(
    name: str,
    teacher: nn.Module,
    student: nn.Module,
    size: int,
    report: Report,
) -> None:
    theirs = sum(p.numel() for p in teacher.parameters())
    report.values.setdefault('parameters', {'student': size})[name] = theirs
    if theirs < SMALLER * size:
        report.find(
            f'the {name} ({type(teacher).__name__}, {theirs / 1e6:.2f} M '
            f'parameters) is smaller than the student '
            f'({type(student).__name__}, {size / 1e6:.2f} M): are the two '
            'swapped? The student is `model`, the teacher is in '
            '`distillation`.',
            'warns',
        )


def _is_fresh(model: nn.Module) -> bool:
    """Return whether a head has the biases that it was initialised with."""
    biases = [
        parameter
        for name, parameter in model.named_parameters()
        if name.partition('.')[0] not in NO_HEADS
        and name.endswith('bias')
        and parameter.numel() > 1
    ]
    return bool(biases) and all(bool((b == b[0]).all()) for b in biases)
