"""One distillation step, read top-down in :meth:`Distiller.loss`."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from mmdet.structures import DetDataSample
from mmengine.dist import is_distributed
from torch import Tensor, nn

from .checkpoint import ATTACHED
from .methods import Method
from .outputs import Outputs
from .registry import METHODS
from .teacher import Teacher, TeacherOutputs, build_teacher
from .utils import (
    ConfigError,
    build_checked,
    check_options,
    isolated_random_state,
)

Losses = dict[str, Tensor | list[Tensor]]
Observer = Callable[[Losses, dict[str, dict[str, Tensor]]], None]

PROBE_SIZE = 320
"""Side of the blank image that tells the widths; SSD needs about 300."""


class Distiller(nn.Module):
    """Distillation beside a stock student, which stays the model.

    Attached, it is a child of the student (so that its adapters are moved,
    optimised, wrapped for distributed training and saved with it) and takes
    the place of the student's ``loss`` on that instance. Everything else of
    the student, names of parameters included, is as before; detached, no
    trace is left.

    Args:
        student: The stock detector.
        teacher: The frozen detector.
        methods: Name to method.
    """

    student: Any

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        methods: Mapping[str, Method],
    ) -> None:
        super().__init__()
        # Past nn.Module's registration: the student is no child of its child.
        self.__dict__['student'] = student
        self.teacher = teacher
        self.methods = nn.ModuleDict(methods)
        self.scales = dict.fromkeys(methods, 1.0)
        """Factors of the methods' weights, set by schedules."""
        self.observers: list[Observer] = []
        """Called with each step's task losses and methods' losses."""

    def loss(
        self, inputs: Tensor, data_samples: Sequence[DetDataSample]
    ) -> Losses:
        """The student's own losses and those of every active method.

        Args:
            inputs: The student's batch, (B, 3, H, W), normalised and padded.
            data_samples: Ground truth and meta data of each image.

        Returns:
            The stock losses under their stock names and
            ``<method>.loss_<part>`` beside them.
        """
        active = self.active_methods()
        student = Outputs(self.student, self._paths('student_paths'))
        if active:
            teacher = self.teacher(inputs, data_samples)
            guides = self._guides(active, teacher, data_samples)
            with guides, student.recording():
                task_losses = self._stock_loss(inputs, data_samples)
        else:
            task_losses = self._stock_loss(inputs, data_samples)
        distilled: dict[str, dict[str, Tensor]] = {}
        for name, (method, weight) in active.items():
            task_losses = scaled(task_losses, method.task_factors(), weight)
            distilled[name] = {
                f'{name}.loss_{part}': weight * loss
                for part, loss in method(
                    student, teacher, data_samples
                ).items()
            }
        for observe in self.observers:
            observe(task_losses, distilled)
        losses = task_losses
        for part_losses in distilled.values():
            losses = {**losses, **part_losses}
        return self._with_idle_parameters(losses, active)

    def active_methods(self) -> dict[str, tuple[Method, float]]:
        """The methods whose weight is not 0 now, with their weights."""
        active = {}
        for name, module in self.methods.items():
            method = cast(Method, module)
            weight = method.loss_weight * self.scales[name]
            if weight:
                active[name] = (method, weight)
        return active

    @contextmanager
    def _guides(
        self,
        active: Mapping[str, tuple[Method, float]],
        teacher: TeacherOutputs,
        data_samples: Sequence[DetDataSample],
    ) -> Iterator[None]:
        with ExitStack() as stack:
            for method, _ in active.values():
                stack.enter_context(
                    method.guide(self.student, teacher, data_samples)
                )
            yield

    def attach(self) -> None:
        """Become part of the student."""
        self.student.add_module(ATTACHED, self)
        self.student.loss = self.loss

    def detach(self) -> None:
        """Leave the student as it was."""
        del self.student.loss
        delattr(self.student, ATTACHED)

    def _stock_loss(
        self, inputs: Tensor, data_samples: Sequence[DetDataSample]
    ) -> Losses:
        return type(self.student).loss(self.student, inputs, data_samples)

    def _paths(self, side: str) -> list[str]:
        return [p for m in self.methods.values() for p in getattr(m, side)]

    def _with_idle_parameters(
        self, losses: Losses, active: Mapping[str, Any]
    ) -> Losses:
        """Keep adapters of idle methods in the graph of distributed steps.

        Distributed training waits for the gradient of every parameter.
        """
        idle = [
            parameter.sum()
            for name, method in self.methods.items()
            if name not in active
            for parameter in method.parameters()
        ]
        if idle and is_distributed():
            losses = {**losses, 'idle.loss': 0.0 * torch.stack(idle).sum()}
        return losses

    def __getstate__(self) -> dict[str, Any]:
        # Copies (EMA) are never trained: nobody observes them.
        return {**self.__dict__, 'observers': []}


def scaled(
    losses: Losses, factors: Mapping[str, float], weight: float
) -> Losses:
    """Scale the student's own losses by a method's factors.

    The factor moves from 1 at weight 0 to its value at weight 1 and beyond.
    """
    if not factors:
        return losses
    share = min(weight, 1.0)
    result: Losses = {}
    for name, loss in losses.items():
        for pattern, factor in factors.items():
            if re.fullmatch(pattern, name):
                scale = 1 + share * (factor - 1)
                loss = (
                    [part * scale for part in loss]
                    if isinstance(loss, list)
                    else loss * scale
                )
        result[name] = loss
    return result


def build_distiller(
    cfg: Mapping[str, Any],
    student: nn.Module,
    classes: Sequence[str],
    seed: int = 0,
) -> Distiller:
    """Build teacher, methods and adapters for a student.

    Args:
        cfg: ``distillation`` of the config: ``teacher`` and ``methods``.
        student: The stock detector on its device.
        classes: The student's class names.
        seed: Seeds the adapters' weights. The global random state is left as
            it is.

    Raises:
        ConfigError: If an option is unknown or the networks do not fit.
        CheckpointError: If the teacher's checkpoint does not fit.
        TapError: If a tap never fires.
    """
    check_options('distillation', cfg, ('teacher', 'methods'))
    for key in ('teacher', 'methods'):
        if not cfg.get(key):
            raise ConfigError(
                f'distillation needs "{key}", got {sorted(cfg)}. Example: '
                'distillation = dict(teacher=dict(config=..., '
                'checkpoint=...), methods=dict(hint=dict('
                "type='mmkd.FeatureHint')))"
            )
    _check_names(cfg['methods'])
    device = next(student.parameters()).device
    with isolated_random_state(seed):
        methods = {
            name: build_checked(METHODS, c, f'distillation.methods.{name}')
            for name, c in cfg['methods'].items()
        }
        teacher = build_teacher(
            cfg['teacher'],
            student=student,
            student_classes=classes,
            paths=[p for m in methods.values() for p in m.teacher_paths],
        ).to(device)
        distiller = Distiller(student, teacher, methods)
        blank = functools.partial(blank_pass, device=device)
        student_outputs = blank(student, distiller._paths('student_paths'))
        teacher_outputs = blank(teacher.model, teacher.paths)
        for method in methods.values():
            method.prepare(student_outputs, teacher_outputs)
        _check_one_guide(methods)
    return distiller.to(device)


def _check_names(methods: Any) -> None:
    if not isinstance(methods, Mapping):
        raise ConfigError(
            'distillation.methods must be a dict of a name of your choice to '
            f'a config, got {methods!r}.'
        )
    for name in methods:
        if not str(name).isidentifier() or hasattr(nn.ModuleDict(), name):
            raise ConfigError(
                f'distillation.methods: "{name}" cannot be the name of a '
                'method, it is also one of losses and weights. Choose a word '
                'such as "hint".'
            )


def _check_one_guide(methods: Mapping[str, Method]) -> None:
    guides = [
        name
        for name, method in methods.items()
        if type(method).guide is not Method.guide
    ]
    if len(guides) > 1:
        raise ConfigError(
            f'distillation.methods: {", ".join(guides)} each steer the '
            "student's own loss; only one can. Keep one of them."
        )


@torch.no_grad()
def blank_pass(
    model: nn.Module, paths: Sequence[str], device: torch.device
) -> Outputs:
    """Record a detector's forward pass on one blank image.

    It runs in eval mode and leaves buffers and modes as they were. A
    detector that cannot run so far still gives what it produced; what is
    missing is reported where it is read.
    """
    size = (PROBE_SIZE, PROBE_SIZE)
    image = torch.linspace(-1, 1, 3 * PROBE_SIZE**2, device=device)
    sample = DetDataSample(
        metainfo=dict(
            img_id=0,
            img_shape=size,
            ori_shape=size,
            pad_shape=size,
            batch_input_shape=size,
            scale_factor=(1.0, 1.0),
        )
    )
    outputs = Outputs(model, paths)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with outputs.recording():
            model(image.view(1, 3, *size), [sample], mode='tensor')
    except Exception as error:  # any detector, any reason: see docstring
        outputs.note = f' (its test pass ended with {error!r})'
    finally:
        for module, mode in modes:
            module.training = mode
    return outputs
