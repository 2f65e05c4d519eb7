"""Does distillation pull the student where its task wants it?"""

from collections.abc import Iterable, Sequence

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from mmkd.core.distiller import Losses
from mmkd.detectors.record import tensors_in
from mmkd.engine.distilled import distiller_of
from mmkd.errors import ConfigError
from mmkd.registry import HOOKS
from mmkd.utils import ATTACHED


@HOOKS.register_module()
class TelemetryHook(Hook):
    """Logs each method's loss, gradient norm and cosine with the task's.

    Every ``interval`` iterations the gradients of the task losses and of each
    method with respect to the student's parameters are taken apart (one more
    backward pass each, on that iteration only) and written to the log and to
    every visualiser of the config, as ``distillation/<method>/loss``,
    ``…/grad_norm``, ``…/cosine`` and ``distillation/task/grad_norm``. A
    cosine near -1 says that the method works against the task. Training
    itself is not changed.

    Args:
        interval: Iterations between two measurements, at least 1.
    """

    priority = 'LOW'

    def __init__(self, *, interval: int = 50) -> None:
        if interval < 1:
            raise ConfigError(f'interval must be at least 1, got {interval}')
        self.interval = interval
        self._parameters: Sequence[Tensor] = ()
        self._due = False
        self._report: dict[str, Tensor] = {}

    def before_train(self, runner: Runner) -> None:
        distiller = distiller_of(runner)
        self._parameters = student_parameters(distiller.student)
        distiller.observers.append(self.observe)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None
    ) -> None:
        self._due = self.every_n_train_iters(runner, self.interval)

    def observe(
        self, task: Losses, distilled: dict[str, dict[str, Tensor]]
    ) -> None:
        """Take the gradients apart, if it is time."""
        if not self._due:
            return
        counted = [v for k, v in task.items() if 'loss' in k]
        task_gradient = gradient(tensors_in(counted), self._parameters)
        report = {'task/grad_norm': norm(task_gradient)}
        for name, losses in distilled.items():
            own = gradient(tuple(losses.values()), self._parameters)
            report[f'{name}/loss'] = torch.stack(
                [loss.detach() for loss in losses.values()]
            ).sum()
            report[f'{name}/grad_norm'] = norm(own)
            report[f'{name}/cosine'] = cosine(task_gradient, own)
        self._report = report

    def after_train_iter(
        self, runner: Runner, *_: object, **__: object
    ) -> None:
        if not self._due:
            return
        values = {
            f'distillation/{key}': float(value)
            for key, value in self._report.items()
        }
        runner.logger.info(
            'Telemetry: '
            + '  '.join(f'{key}: {v:.4g}' for key, v in values.items())
        )
        runner.visualizer.add_scalars(values, step=runner.iter + 1)
        self._report, self._due = {}, False


def student_parameters(student: nn.Module) -> list[nn.Parameter]:
    """The student's own trainable parameters, without adapters."""
    return [
        parameter
        for name, parameter in student.named_parameters()
        if parameter.requires_grad and not name.startswith(f'{ATTACHED}.')
    ]


def gradient(
    losses: Iterable[Tensor], parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradient of the sum of losses; None where it does not reach."""
    total = sum(loss.mean() for loss in losses)
    if not isinstance(total, Tensor) or not total.requires_grad:
        return [None] * len(parameters)
    return list(
        torch.autograd.grad(
            total, parameters, retain_graph=True, allow_unused=True
        )
    )


def norm(gradients: Iterable[Tensor | None]) -> Tensor:
    """The Euclidean norm over all tensors together."""
    norms = [g.float().norm() for g in gradients if g is not None]
    return torch.stack(norms).norm() if norms else torch.tensor(0.0)


def cosine(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> Tensor:
    """The cosine of two gradients; 0 where one is 0."""
    dot = sum(
        (x * y).sum()
        for x, y in zip(a, b, strict=True)
        if x is not None and y is not None
    )
    return dot / (norm(a) * norm(b)).clamp(min=1e-30)
