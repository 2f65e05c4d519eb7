"""Measure whether distillation and the task pull the same way."""

from collections.abc import Iterable, Sequence

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from mmkd.core.distiller import Losses
from mmkd.core.gradients import gradient, student_parameters
from mmkd.detectors.record import tensors_in
from mmkd.engine.distilled import distiller_of
from mmkd.errors import ConfigError
from mmkd.registry import HOOKS


@HOOKS.register_module()
class TelemetryHook(Hook):
    """Log each method's loss, and how its gradient relates to the task's.

    Every ``interval`` iterations the hook computes separately the gradients
    of the task losses and of each method with respect to the student's
    parameters, which takes one more backward pass for each in that iteration.
    It writes to the log and to every visualiser of the config:
    ``distillation/<method>/loss``, ``…/grad_norm``, ``…/cosine`` (with the
    task's gradient) and ``distillation/task/grad_norm``. A cosine near -1
    means that the method works against the task. The training itself does
    not change.

    Args:
        interval: Iterations between two measurements, at least 1.

    Raises:
        ConfigError: If ``interval`` is below 1.
    """

    priority = 'LOW'

    def __init__(self, *, interval: int = 50) -> None:
        if interval < 1:
            raise ConfigError(
                f'TelemetryHook.interval must be at least 1, got {interval}.'
            )
        self.interval = interval
        self._student: nn.Module = nn.Module()
        self._due = False
        self._report: dict[str, Tensor] = {}

    def before_train(self, runner: Runner) -> None:
        distiller = distiller_of(runner)
        self._student = distiller.student
        distiller.observers.append(self.observe)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None
    ) -> None:
        self._due = self.every_n_train_iters(runner, self.interval)

    def observe(
        self, task: Losses, distilled: dict[str, dict[str, Tensor]]
    ) -> None:
        """Compute the gradients separately if a measurement is due.

        Args:
            task: The student's own losses, by name.
            distilled: Each method's losses, by name.
        """
        if not self._due:
            return
        counted = [v for k, v in task.items() if 'loss' in k]
        task_gradient = self._gradient(tensors_in(counted))
        report = {'task/grad_norm': norm(task_gradient)}
        for name, losses in distilled.items():
            own = self._gradient(losses.values())
            report[f'{name}/loss'] = torch.stack(
                [loss.detach() for loss in losses.values()]
            ).sum()
            report[f'{name}/grad_norm'] = norm(own)
            report[f'{name}/cosine'] = cosine(task_gradient, own)
        self._report = report

    def _gradient(self, losses: Iterable[Tensor]) -> list[Tensor | None]:
        parameters = student_parameters(self._student)
        return gradient(losses, parameters, self._student)

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


def norm(gradients: Iterable[Tensor | None]) -> Tensor:
    """Compute the Euclidean norm over all tensors together.

    Example:
        >>> import torch
        >>> from mmkd.engine.hooks.telemetry import norm
        >>> norm([torch.tensor([3.0]), None, torch.tensor([4.0])])
        tensor(5.)
    """
    norms = [g.float().norm() for g in gradients if g is not None]
    return torch.stack(norms).norm() if norms else torch.tensor(0.0)


def cosine(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> Tensor:
    """Compute the cosine between two gradients; 0 where one of them is 0.

    Example:
        >>> import torch
        >>> from mmkd.engine.hooks.telemetry import cosine
        >>> cosine([torch.tensor([3.0, 4.0])], [torch.tensor([-6.0, -8.0])])
        tensor(-1.)
    """
    dot = sum(
        (x * y).sum()
        for x, y in zip(a, b, strict=True)
        if x is not None and y is not None
    )
    return dot / (norm(a) * norm(b)).clamp(min=1e-30)
