"""One distillation step, read top-down in :meth:`Distiller.loss`."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from mmdet.structures import DetDataSample
from mmengine.dist import is_distributed
from torch import Tensor, nn

from mmkd.detectors.blank import blank_pass
from mmkd.detectors.record import Outputs
from mmkd.engine.checkpoint import ATTACHED
from mmkd.peers.peer import Peer, build_peer, with_trained_teacher
from mmkd.teachers.frozen import Teacher
from mmkd.teachers.several import (
    MeanTeacher,
    SeveralTeachers,
    build_teachers,
    cache_hits,
    named,
)
from mmkd.utils import isolated_random_state

from .checks import (
    check_keys,
    check_names,
    check_needs,
    check_one_guide,
    check_reserved,
)
from .each_teacher import FromEach, build_method
from .method import Method

Losses = dict[str, Tensor | list[Tensor]]
Observer = Callable[[Losses, dict[str, dict[str, Tensor]]], None]


class Distiller(nn.Module):
    """Distillation beside a stock student, which stays the model.

    Attached, it is a child of the student (so that its adapters are moved,
    optimised, wrapped for distributed training and saved with it) and takes
    the place of the student's ``loss`` on that instance. Everything else of
    the student, names of parameters included, is as before; detached, no
    trace is left.

    Args:
        student: The stock detector.
        teacher: The frozen detector, if there is one, or several.
        methods: Name to method.
        peers: Name to the networks that train beside the student.
    """

    student: Any

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | SeveralTeachers | MeanTeacher | None,
        methods: Mapping[str, Method],
        peers: Mapping[str, Peer] | None = None,
    ) -> None:
        super().__init__()
        # Past nn.Module's registration: the student is no child of its child.
        self.__dict__['student'] = student
        self.teacher: Any = teacher
        self.methods = nn.ModuleDict(methods)
        self.peers: Any = nn.ModuleDict(peers or {})
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
            The stock losses under their stock names, ``<method>.loss_<part>``
            and ``<peer>.<stock name>`` beside them.
        """
        active = self.active_methods()
        student = self._outputs()
        teacher = self.teacher and self.teacher(inputs, data_samples)
        with self._steered(active, student, teacher, data_samples):
            task_losses = self._stock_losses(inputs, data_samples)
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
        if teacher:
            for name, share in cache_hits(teacher).items():
                losses = {**losses, name: inputs.new_tensor(share)}
        losses = {**losses, **self._statistics(active)}
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

    @property
    def networks(self) -> dict[str, Teacher]:
        """The frozen networks by their names in logs; often one."""
        return {} if self.teacher is None else self.teacher.networks

    def attach(self) -> None:
        """Become part of the student."""
        self.student.add_module(ATTACHED, self)
        self.student.loss = self.loss

    def detach(self) -> None:
        """Leave the student as it was."""
        del self.student.loss
        delattr(self.student, ATTACHED)

    def _outputs(self) -> Outputs:
        """Of the student and its peers, to be recorded."""
        student = Outputs(self.student, self._paths('student_paths'))
        paths = self._paths('peer_paths')
        student.peers = {
            name: Outputs(peer.model, paths)
            for name, peer in self.peers.items()
        }
        return student

    @contextmanager
    def _steered(
        self,
        active: Mapping[str, tuple[Method, float]],
        student: Outputs,
        teacher: Any,
        data_samples: Sequence[DetDataSample],
    ) -> Iterator[None]:
        """Record the networks; let methods steer their losses."""
        with ExitStack() as stack:
            for method, _ in active.values():
                stack.enter_context(
                    method.guide(student, teacher, data_samples)
                )
            for outputs in (student, *student.peers.values()):
                if active:
                    stack.enter_context(outputs.recording())
            yield

    def _stock_losses(
        self, inputs: Tensor, data_samples: Sequence[DetDataSample]
    ) -> Losses:
        """The student's own losses and, as ``<peer>.<name>``, the peers'."""
        losses: Losses = type(self.student).loss(
            self.student, inputs, data_samples
        )
        others = {
            name: peer.loss(inputs, data_samples)
            for name, peer in self.peers.items()
        }
        for peer, each in others.items():
            losses = {
                **losses,
                **{f'{peer}.{name}': loss for name, loss in each.items()},
            }
        return losses

    @staticmethod
    def _statistics(active: Mapping[str, tuple[Method, float]]) -> Losses:
        return {
            f'{name}.{key}': value
            for name, (method, _) in active.items()
            for key, value in method.statistics.items()
        }

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
        cfg: ``distillation`` of the config: ``teacher``, ``peers`` and
            ``methods``. A teacher with ``trainable=True`` is the peer
            ``teacher``.
        student: The stock detector on its device.
        classes: The student's class names.
        seed: Seeds the adapters' weights. The global random state is left as
            it is.

    Raises:
        ConfigError: If an option is unknown or the networks do not fit.
        CheckpointError: If the teacher's checkpoint does not fit.
        TapError: If a tap never fires.
    """
    check_keys(cfg)
    cfg = with_trained_teacher(cfg)
    method_cfgs, peer_cfgs = cfg.get('methods') or {}, cfg.get('peers') or {}
    check_names('methods', method_cfgs)
    check_names('peers', peer_cfgs, taken=method_cfgs)
    check_reserved(peer_cfgs, cfg)
    device = next(student.parameters()).device
    peers = {
        name: build_peer(
            name, c, student=student, classes=classes, seed=seed + number
        ).to(device)
        for number, (name, c) in enumerate(peer_cfgs.items(), 1)
    }
    with isolated_random_state(seed):
        methods = {
            name: build_method(name, c, cfg.get('teacher'))
            for name, c in method_cfgs.items()
        }
        check_needs(methods, cfg)
        check_one_guide(methods)
        teacher = None
        if cfg.get('teacher'):
            teacher = build_teachers(
                cfg['teacher'],
                student=student,
                student_classes=classes,
                paths=[p for m in methods.values() for p in m.teacher_paths],
            ).to(device)
        distiller = Distiller(student, teacher, methods, peers)
        _prepare(distiller, device)
    return distiller.to(device)


def _prepare(distiller: Distiller, device: torch.device) -> None:
    """Let the methods see what the networks make of a blank image."""

    def blank(model: nn.Module, paths: Sequence[str]) -> Outputs:
        return blank_pass(model, paths, device)

    student = blank(distiller.student, distiller._paths('student_paths'))
    paths = distiller._paths('peer_paths')
    student.peers = {
        name: blank(peer.model, paths)
        for name, peer in distiller.peers.items()
    }
    teacher = distiller.teacher
    theirs = teacher and teacher.blank(blank)
    for method in distiller.methods.values():
        if isinstance(theirs, dict) and not isinstance(method, FromEach):
            with named('a list of teachers teaches no method on peers'):
                cast(Any, method).prepare(student, None)
        else:
            cast(Method, method).prepare(student, theirs)
