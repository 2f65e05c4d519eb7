"""One distillation step, read top-down in :meth:`Distiller.loss`."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from mmdet.structures import DetDataSample
from mmengine.dist import is_distributed
from torch import Tensor, nn

from mmkd.data.batch import Batch
from mmkd.detectors.blank import blank_pass
from mmkd.detectors.facts import box_class_names, numbered_classes
from mmkd.detectors.record import StepRecord
from mmkd.detectors.source import check_class_count
from mmkd.detectors.wrappers import check_is_detector
from mmkd.peers.peer import Peer, build_peer, with_trained_teacher
from mmkd.registry import METHODS
from mmkd.teachers.build import build_teacher
from mmkd.teachers.several import log_name, named
from mmkd.teachers.view import (
    NoTeacher,
    NoView,
    Teacher,
    TeacherContext,
    TeacherView,
)
from mmkd.utils import ATTACHED, build_checked, isolated_random_state

from .checks import (
    check_gives,
    check_keys,
    check_names,
    check_not_summed,
    check_one_steers,
    check_reserved,
    check_sources,
    say_idle_aliases,
    say_left_out,
)
from .each_teacher import FromEach
from .method import Method
from .unlabelled import Unlabelled, build_unlabelled

Losses = dict[str, Tensor | list[Tensor]]
Active = Mapping[str, tuple[Method, float]]
Observer = Callable[[Losses, dict[str, dict[str, Tensor]]], None]


class Distiller(nn.Module):
    """Distillation beside a stock student, which stays the model.

    While it is attached, it is a child of the student, so that its adapters
    are moved, optimised, wrapped for distributed training and saved with the
    student; and it takes the place of ``loss`` on that instance. Everything
    else about the student stays as it was, including the names of its
    parameters. Detaching leaves no trace.

    Args:
        student: The stock detector.
        teacher: The teacher; None for networks that only train together.
        methods: Name to method.
        peers: Name to the networks that train beside the student.
        unlabelled: The images without labels, if there are any.
    """

    not_resumed = ('unlabelled',)
    student: Any

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        methods: Mapping[str, Method],
        peers: Mapping[str, Peer] | None = None,
        unlabelled: Unlabelled | None = None,
    ) -> None:
        super().__init__()
        # This bypasses nn.Module: the student is no child of its own child.
        self.__dict__['student'] = student
        self.teacher: Teacher = teacher or NoTeacher()
        self.methods = nn.ModuleDict(methods)
        self.peers: Any = nn.ModuleDict(peers or {})
        self.unlabelled = unlabelled
        self.scales = dict.fromkeys(methods, 1.0)
        """Factors of the methods' weights, set by schedules."""
        self.balances = dict.fromkeys(methods, 1.0)
        """Further factors, which hold the methods' shares of the gradient."""
        self.steps = 0
        """The number of steps taken; a resumed run continues it."""
        self.epoch_length: int | None = None
        """The number of steps in an epoch, if it is known."""
        self.observers: list[Observer] = []
        """They are called with the task losses and the methods' losses."""

    def loss(
        self, inputs: Tensor, data_samples: Sequence[DetDataSample]
    ) -> Losses:
        """Return the student's own losses and those of every active method.

        Args:
            inputs: The student's batch, (B, 3, H, W), normalised and padded.
            data_samples: Ground truth and meta data of each image.

        Returns:
            The stock losses under their stock names, ``<method>.loss_<part>``
            and ``<peer>.<stock name>`` beside them, and on unlabelled images
            ``<method>.unlabelled_loss_<part>``.
        """
        active = self.active_methods()
        batch = self._next(inputs, data_samples, active)
        student, teacher = self._record(), self.teacher.view(batch)
        with self._steered(active, student, teacher, batch) as steered:
            losses = self._stock_losses(batch, steered)
        distilled: dict[str, dict[str, Tensor]] = {}
        for name, (method, weight) in active.items():
            losses = scaled(losses, method.task_factors(), weight)
            found = {}
            if not (self.alone or method.only_unlabelled):
                found = method(student, teacher, batch, self.factor(name))
            distilled[name] = {f'{name}.loss_{k}': v for k, v in found.items()}
        for name, found in self._unlabelled_losses(batch, active).items():
            distilled[name] |= found
        for observe in self.observers:
            observe(losses, distilled)
        for part in distilled.values():
            losses = {**losses, **part}
        losses = {**losses, **self._statistics(active, teacher, batch)}
        return self._with_idle_parameters(losses, active)

    def active_methods(self) -> dict[str, tuple[Method, float]]:
        """The methods whose current weight is not 0, with that weight."""
        active = {}
        for name, module in self.methods.items():
            method = cast(Method, module)
            weight = method.loss_weight * self.factor(name)
            if weight:
                active[name] = (method, weight)
        return active

    @property
    def alone(self) -> bool:
        """Whether the student learns from unlabelled images alone."""
        return self.unlabelled is not None and self.unlabelled.alone

    def factor(self, name: str) -> float:
        """Return what a method's ``loss_weight`` is multiplied by now."""
        return self.scales[name] * self.balances[name]

    @property
    def networks(self) -> Mapping[str, Any]:
        """The frozen detectors, often a single one, by their names in logs."""
        return self.teacher.networks

    def set_teacher(
        self, teacher: Teacher | Mapping[str, Tensor], name: str = 'teacher'
    ) -> None:
        """Replace the teacher, or a frozen detector's weights, between rounds.

        Entries of a teacher's cache that belong to other weights are not
        used, because the weights are part of an entry's name.

        Args:
            teacher: A stock state dict of the same detector, or another
                teacher that gives the same things in the same shapes.
            name: With a state dict, the detector's name in logs.

        Raises:
            ConfigError: If there is no such detector, or it has no weights
                that can be replaced.
            CheckpointError: If the weights do not fit exactly.
        """
        if isinstance(teacher, Teacher):
            self.teacher = teacher
        elif name in self.networks:
            self.networks[name].set_weights(teacher)
        else:
            self.teacher.set_weights(teacher)

    def attach(self) -> None:
        """Become part of the student."""
        self.student.add_module(ATTACHED, self)
        self.student.loss = self.loss

    def detach(self) -> None:
        """Leave the student as it was."""
        del self.student.loss
        delattr(self.student, ATTACHED)

    def _next(
        self,
        inputs: Tensor,
        data_samples: Sequence[DetDataSample],
        active: Active,
    ) -> Batch:
        """Return the batch of the step that begins now."""
        step, length = self.steps, self.epoch_length
        self.steps += 1
        epoch, unlabelled = step // length if length else 0, None
        if self.unlabelled is not None:
            unlabelled = self.unlabelled.next(active, step, epoch)
        return Batch(inputs, data_samples, unlabelled, step=step, epoch=epoch)

    def _record(self) -> StepRecord:
        """Return an empty record for the student, with one for each peer."""
        student = StepRecord(self.student, self._paths('student_paths'))
        paths = self._paths('peer_paths')
        student.peers = {
            name: StepRecord(peer.model, paths)
            for name, peer in self.peers.items()
        }
        return student

    @contextmanager
    def _steered(
        self,
        active: Active,
        student: StepRecord,
        teacher: TeacherView,
        batch: Batch,
    ) -> Iterator[Batch]:
        """Record the networks, and let methods steer their losses.

        Yields:
            The batch that the student's own loss trains on.
        """
        steered = batch
        with ExitStack() as stack:
            for method, _ in active.values():
                if method.steers:
                    steer = method.steer(student, teacher, batch)
                    samples = stack.enter_context(steer)
                    if samples is not None:
                        steered = replace(batch, data_samples=samples)
            for record in (student, *student.peers.values()):
                if active:
                    stack.enter_context(record.recording())
            yield steered

    def _stock_losses(self, batch: Batch, steered: Batch) -> Losses:
        """Return the stock losses; those of peers are ``<peer>.<name>``.

        Args:
            batch: What the peers train on.
            steered: What the student trains on.
        """
        if self.alone:
            return {}
        losses: Losses = type(self.student).loss(
            self.student, steered.inputs, steered.copies()
        )
        others = {n: peer.loss(batch) for n, peer in self.peers.items()}
        for peer, each in others.items():
            losses = {
                **losses,
                **{f'{peer}.{name}': loss for name, loss in each.items()},
            }
        return losses

    def _unlabelled_losses(
        self, batch: Batch, active: Active
    ) -> dict[str, dict[str, Tensor]]:
        """Return each method's losses on unlabelled images, by full name."""
        if self.unlabelled is None or batch.unlabelled is None:
            return {}
        losses = self.unlabelled.losses(
            batch.unlabelled,
            {name: method for name, (method, _) in active.items()},
            self._record(),
            self.teacher,
            self.factor,
        )
        return {
            name: {f'{name}.unlabelled_loss_{k}': v for k, v in found.items()}
            for name, found in losses.items()
        }

    def _statistics(
        self, active: Active, teacher: TeacherView, batch: Batch
    ) -> Losses:
        """Return what teachers and methods log in addition to losses."""
        found: Losses = {
            f'{log_name(label)}.{key}': batch.inputs.new_tensor(value)
            for label, view in teacher.each().items()
            for key, value in view.statistics().items()
        }
        for name, (method, _) in active.items():
            for key, value in method.statistics.items():
                found[f'{name}.{key}'] = value
        if batch.unlabelled is not None and self.unlabelled is not None:
            found |= self.unlabelled.statistics
        check_not_summed(found)
        return found

    def _paths(self, side: str) -> list[str]:
        return [p for m in self.methods.values() for p in getattr(m, side)]

    def _with_idle_parameters(self, losses: Losses, active: Active) -> Losses:
        """Keep all trained parameters in the graph of distributed steps.

        Distributed training waits for the gradient of every parameter. The
        adapters of idle methods have none, and a part of the student may have
        none where a factor of 0 takes its loss away. A student without labels
        has no loss at all while its methods are idle.
        """
        if not (is_distributed() or self.alone):
            return losses
        idle = [
            parameter.sum()
            for name, method in self.methods.items()
            if name not in active
            for parameter in method.parameters()
        ]
        if self.alone or any(
            weight >= 1 and 0 in method.task_factors().values()
            for method, weight in active.values()
        ):
            idle += [p.sum() for p in self.student.parameters()]
        if idle:
            losses = {**losses, 'idle.loss': 0.0 * torch.stack(idle).sum()}
        return losses

    def __getstate__(self) -> dict[str, Any]:
        # Copies (EMA) are never trained, so nobody observes them.
        return {**self.__dict__, 'observers': [], 'unlabelled': None}


def scaled(
    losses: Losses, factors: Mapping[str, float], weight: float
) -> Losses:
    """Scale the student's own losses by a method's factors.

    The factor moves from 1 at weight 0 to its value at weight 1 and beyond.
    Where it is 0, the loss is 0 and has no gradient, even if it was not
    finite.
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
                    [_times(part, scale) for part in loss]
                    if isinstance(loss, list)
                    else _times(loss, scale)
                )
        result[name] = loss
    return result


def _times(loss: Tensor, scale: float) -> Tensor:
    return loss * scale if scale else torch.zeros_like(loss)


def build_distiller(
    cfg: Mapping[str, Any],
    student: nn.Module,
    classes: Sequence[str] | None,
    seed: int = 0,
) -> Distiller:
    """Build teacher, methods and adapters for a student.

    Args:
        cfg: ``distillation`` of the config: ``teacher``, ``peers``,
            ``methods``, ``unlabelled`` and ``class_aliases``. A teacher with
            ``trainable=True`` is the peer ``teacher``. Whoever trains gives
            ``distiller.unlabelled`` its stream of batches.
        student: The stock detector on its device.
        classes: The student's class names. None if the data have none: a
            teacher of as many classes is then taken to know the same.
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
    check_is_detector(student, 'student')
    device = next(student.parameters()).device
    named = bool(classes)
    if classes:
        check_class_count(student, classes)
        names = box_class_names(student, classes)
    else:
        names = numbered_classes(student)
    peers = {
        name: build_peer(
            name,
            c,
            student=student,
            classes=names,
            named=named,
            seed=(seed + number) % 2**32,
        ).to(device)
        for number, (name, c) in enumerate(peer_cfgs.items(), 1)
    }
    with isolated_random_state(seed):
        methods: dict[str, Method] = {
            name: build_checked(METHODS, c, f'distillation.methods.{name}')
            for name, c in method_cfgs.items()
        }
        check_sources(methods, cfg)
        check_one_steers(methods)
        paths = [p for m in methods.values() for p in m.teacher_paths]
        aliases = cfg.get('class_aliases') or {}
        context = TeacherContext(student, names, paths, named, aliases)
        teacher = build_teacher(cfg.get('teacher'), context).to(device)
        say_left_out(teacher)
        say_idle_aliases(aliases, teacher)
        for name, method in methods.items():
            methods[name] = _taught(name, method, teacher)
        unlabelled = build_unlabelled(
            cfg.get('unlabelled'), student, methods, teacher, seed
        )
        distiller = Distiller(student, teacher, methods, peers, unlabelled)
        _prepare(distiller, device)
    return distiller.to(device)


def _taught(name: str, method: Method, teacher: Teacher) -> Method:
    """Return the method, or for a list one copy for each teacher."""
    if method.learns_from != 'teacher':
        return method
    check_gives(name, method, teacher)
    labels = [label for label in teacher.each() if label]
    return FromEach(method, labels) if labels else method


def _prepare(distiller: Distiller, device: torch.device) -> None:
    """Show the methods what the networks make of a blank image."""
    student = blank_pass(
        distiller.student, distiller._paths('student_paths'), device
    )
    paths = distiller._paths('peer_paths')
    student.peers = {
        name: blank_pass(peer.model, paths, device)
        for name, peer in distiller.peers.items()
    }
    teacher = distiller.teacher.blank(device)
    for method in distiller.methods.values():
        if any(teacher.each()) and not isinstance(method, FromEach):
            with named('a list of teachers teaches no method on peers'):
                cast(Method, method).prepare(student, NoView())
        else:
            cast(Method, method).prepare(student, teacher)
