"""Whether a method moves the student, and if not, why."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor, nn

from mmkd.detectors.blank import blank_pass
from mmkd.detectors.record import StepRecord
from mmkd.utils import ATTACHED

from .gradients import gradient, student_parameters, untouched
from .method import Method

SCALE = 2.0**16
"""A factor of losses, without which gradients in float16 may vanish."""
HEADS = ('bbox_head', 'rpn_head', 'roi_head.bbox_head')
"""What methods without taps read."""


def optimizers_of(
    wrapper: OptimWrapper | OptimWrapperDict,
) -> list[torch.optim.Optimizer]:
    """Return the optimisers of a wrapper, or of a dict of wrappers."""
    return [each.optimizer for each in wrappers_of(wrapper)]


def wrappers_of(wrapper: OptimWrapper | OptimWrapperDict) -> list[Any]:
    """Return a wrapper, or those of a dict of wrappers, in a list."""
    several = isinstance(wrapper, OptimWrapperDict)
    return list(wrapper.values()) if several else [wrapper]


def moved_parameters(
    student: nn.Module, optimizers: Iterable[torch.optim.Optimizer]
) -> list[nn.Parameter]:
    """Return the student's parameters that the optimisers change.

    These have a learning rate above 0 once the warm-up is over. Where none
    has one, the student stands still for another reason than a method, and
    all trainable parameters are returned.
    """
    moved = {
        id(parameter)
        for optimizer in optimizers
        for group in optimizer.param_groups
        # Schedulers keep the rate at which they begin as initial_lr.
        if group['lr'] or group.get('initial_lr')
        for parameter in group['params']
    }
    trainable = student_parameters(student)
    return [p for p in trainable if id(p) in moved] or trainable


def reached(
    losses: Iterable[Tensor],
    parameters: Sequence[nn.Parameter],
    model: nn.Module,
) -> bool | None:
    """Return whether losses have a gradient in any of the parameters.

    Returns:
        True, False where all gradients are exactly 0, None where the losses
        do not depend on the parameters at all.
    """
    scaled = [SCALE * loss for loss in losses]
    found = gradient(scaled, parameters, model)
    parts = [g.any() for g in found if g is not None]
    return bool(torch.stack(parts).any()) if parts else None


def cause(
    method: Method, student: nn.Module, parameters: Sequence[nn.Parameter]
) -> str:
    """Say why a method's losses do not reach the student, and what would.

    One blank image runs through the student as in training, and each of its
    modules is asked whether its output has a gradient in the parameters.

    Args:
        method: The method.
        student: The detector.
        parameters: Those that the optimisers change.
    """
    return _Walk(student, method.student_paths, parameters).cause()


class _Walk:
    """The outputs of all modules for a blank image, with gradients."""

    def __init__(
        self,
        student: nn.Module,
        paths: Iterable[str],
        parameters: Sequence[nn.Parameter],
    ) -> None:
        self.student, self.parameters = student, parameters
        modules = [
            path
            for path, _ in student.named_modules()
            if path and path.partition('.')[0] != ATTACHED
        ]
        self.asked = [*dict.fromkeys(paths)] or HEADS
        device = next(student.parameters()).device
        with untouched(student):
            self.record: StepRecord = blank_pass(
                student, [*modules, *self.asked], device, as_in_training=True
            )
            self.fired = self.record.fired

    def cause(self) -> str:
        """Return what is wrong with the first tap that does not work."""
        for path in map(self.record.resolved, self.asked):
            if path in self.fired and not self._works(path):
                nearest = self._nearest(path)
                remedy = (
                    f'The nearest module that works is "{nearest}".'
                    if nearest
                    else 'No module after it works.'
                )
                return f'Its tap "{path}" {self._why(path)}. {remedy}'
        return (
            'What it reads of the student has gradients, so the method '
            'itself loses them, as .detach(), torch.no_grad() or a factor 0 '
            'do.'
        )

    def _works(self, path: str) -> bool:
        """Return whether the output at a path depends on the parameters."""
        with untouched(self.student):
            mixed = [
                (t * torch.rand_like(t)).sum()
                for t in self.record.features(path)
                if t.requires_grad
            ]
            return bool(reached(mixed, self.parameters, self.student))

    def _why(self, path: str) -> str:
        outputs = self.record.features(path)
        if any(t.requires_grad for t in outputs):
            return (
                'depends only on weights whose learning rate is 0 (lr_mult=0) '
                'or that the optimiser does not hold'
            )
        if path in self.record.without_gradients:
            parts = path.split('.')
            above = ['.'.join(parts[:n]) for n in range(len(parts), 0, -1)]
            blocks = [p for p in above if self._checkpointed(p)]
            block = f'"{blocks[0]}"' if blocks else 'a block'
            return (
                f'lies within {block}, whose inner parts run without '
                'gradients, because it is checkpointed (with_cp=True, '
                'reentrant) or under torch.no_grad()'
            )
        before = self.fired[: self.fired.index(path) + 1]
        if any(p.requires_grad for b in before for p in self._weights(b)):
            return 'is detached within the student, or all before it is frozen'
        return (
            'and all before it are frozen: requires_grad=False, as set by '
            'frozen_stages or a hook'
        )

    def _checkpointed(self, path: str) -> bool:
        try:
            module = self.student.get_submodule(path)
        except AttributeError:
            return False
        return bool(getattr(module, 'with_cp', False))

    def _weights(self, path: str) -> list[nn.Parameter]:
        """Return the weights of a leaf; containers end after their parts."""
        try:
            module = self.student.get_submodule(path)
        except AttributeError:
            return []
        return list(module.parameters(recurse=False))

    def _nearest(self, path: str) -> str | None:
        """Return the module after a tap that works and gives similar maps.

        Modules around the tap come first, and then those after it.
        """
        tapped = self.record.features(path)
        sizes = [t.shape[2:] for t in tapped]
        later = self.fired[self.fired.index(path) + 1 :]
        ranks: dict[str, tuple[bool, bool, bool, int]] = {}
        for order, other in enumerate(later):
            outputs = self.record.features(other)
            kinds = {(t.dim(), len(t)) for t in outputs}
            if kinds != {(t.dim(), len(t)) for t in tapped}:
                continue
            ranks[other] = (
                [t.shape[2:] for t in outputs] != sizes,
                (len(outputs) > 1) != (len(tapped) > 1),
                not path.startswith(f'{other}.'),
                order,
            )
        near = sorted(ranks, key=ranks.__getitem__)
        return next((other for other in near if self._works(other)), None)
