"""Watch that every method moves the student."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from mmkd.core.distiller import Losses
from mmkd.core.reach import (
    cause,
    moved_parameters,
    optimizers_of,
    reached,
)
from mmkd.engine.distilled import distiller_of
from mmkd.errors import ConfigError
from mmkd.registry import HOOKS

UNRELATED, STILL, MOVES = range(3)
"""Losses that do not depend on the student, with a gradient of 0, of more."""


@dataclass
class Waiting:
    """A method that has not been seen to move the student."""

    iterations: int = 0
    """In how many it was active."""
    since: int | None = None
    """How many steps the optimiser had taken when its gradient was 0 first."""


@HOOKS.register_module()
class ReachCheckHook(Hook):
    """Stop at a method that does not move the student.

    In the first iteration in which a method's losses are not 0, they must
    have a gradient in a weight of the student that the optimiser changes.
    Without one, adapters learn and losses fall, but the student trains as it
    does alone. The message names the cause, such as a tap within a frozen or
    a checkpointed block, and the nearest module that works. Methods that steer
    the student's own loss move it by that and are not judged. If a method
    moves the student, but one of its losses does not, the hook warns.

    A gradient of exactly 0 is judged again after the optimiser's next step if
    the method has layers of its own, because these may begin with weights of
    0. Losses of which some are 0, as on images without objects, are judged
    again in the next iteration.

    This takes another backward pass for each loss, once. The training itself
    does not change.

    Args:
        stop: Stop the training. If False, only warn, as for a student that is
            frozen on purpose while adapters learn.
        patience: The number of iterations, at least 1, after which a method is
            not judged again: then it has failed, or its losses are all 0, of
            which :class:`LossCheckHook` warns.

    Raises:
        ConfigError: If ``patience`` is below 1, or a method does not move the
            student.
    """

    priority = 'VERY_LOW'

    def __init__(self, *, stop: bool = True, patience: int = 50) -> None:
        if patience < 1:
            raise ConfigError(
                f'ReachCheckHook.patience must be at least 1, got {patience}.'
            )
        self.stop, self.patience = stop, patience
        self._runner: Any = None
        self._waiting: dict[str, Waiting] = {}
        self._steps = 0

    def before_train(self, runner: Runner) -> None:
        self._runner, self._steps = runner, 0
        distiller: Any = distiller_of(runner)
        self._waiting = {
            name: Waiting()
            for name, method in distiller.methods.items()
            if not method.steers
        }
        distiller.observers.append(self.observe)
        for optimizer in optimizers_of(runner.optim_wrapper):
            optimizer.register_step_post_hook(self._count)

    def _count(self, *_: object) -> None:
        self._steps += 1

    # All processes of a distributed run decide alike and take the same
    # backward passes, because these may wait for each other (SyncBN).

    def observe(
        self, task: Losses, distilled: dict[str, dict[str, Tensor]]
    ) -> None:
        """Judge the active methods that have not been seen to move it.

        Args:
            task: The networks' own losses, by name.
            distilled: Each method's losses, by name.

        Raises:
            ConfigError: If a method does not move the student.
        """
        judged = {n: distilled[n] for n in self._waiting if n in distilled}
        if not judged:
            return
        facts = torch.tensor(list(map(_facts, judged.values()))).int()
        all_reduce(facts, 'min')
        for (name, losses), (present, whole) in zip(
            judged.items(), facts.tolist(), strict=True
        ):
            waiting = self._waiting[name]
            waiting.iterations += 1
            late = waiting.iterations >= self.patience
            result = self._reached(losses.values()) if present else None
            if result == MOVES:
                if whole:
                    self._check_parts(name, losses)
            elif result is not None and (
                late or (whole and self._is_certain(name, result))
            ):
                self._report(name, losses, stop=self.stop)
            elif not late:
                continue
            del self._waiting[name]

    def _reached(self, losses: Iterable[Tensor]) -> int:
        """Return what losses do in the student, in any of the processes."""
        student = self._distiller.student
        found = reached(losses, self._parameters(), student)
        highest = torch.tensor(
            UNRELATED if found is None else MOVES if found else STILL
        )
        all_reduce(highest, 'max')
        return int(highest)

    def _is_certain(self, name: str, result: int) -> bool:
        """Return whether no step of the optimiser will change the result."""
        waiting = self._waiting[name]
        if waiting.since is None:
            waiting.since = self._steps
        own = self._distiller.methods[name].parameters()
        return (
            result == UNRELATED
            or self._steps > waiting.since
            or not any(p.requires_grad for p in own)
        )

    def _check_parts(self, name: str, losses: Mapping[str, Tensor]) -> None:
        """Warn of losses without effect beside others that have one.

        Methods between peers have losses for each of the networks.
        """
        learns_from = self._distiller.methods[name].learns_from
        if len(losses) == 1 or learns_from != 'teacher':
            return
        still = [k for k, v in losses.items() if self._reached([v]) != MOVES]
        if still:
            self._report(name, still, stop=False)

    def _report(self, name: str, losses: Iterable[str], *, stop: bool) -> None:
        distiller, parameters = self._distiller, self._parameters()
        why = cause(distiller.methods[name], distiller.student, parameters)
        text = (
            f'distillation.methods.{name}: no gradient of {", ".join(losses)} '
            'reaches a weight of the student that the optimiser changes, so '
            f'the student trains as without it. {why}'
        )
        if stop:
            raise ConfigError(text)
        self._runner.logger.warning(text)

    def _parameters(self) -> list[nn.Parameter]:
        optimizers = optimizers_of(self._runner.optim_wrapper)
        return moved_parameters(self._distiller.student, optimizers)

    @property
    def _distiller(self) -> Any:
        return distiller_of(self._runner)


def _facts(losses: Mapping[str, Tensor]) -> tuple[bool, bool]:
    """Return whether any of a method's losses is not 0, and whether all."""
    if not losses:
        return False, False
    values = torch.stack([loss.detach().mean() for loss in losses.values()])
    found = (values != 0).tolist()
    return any(found), all(found)
