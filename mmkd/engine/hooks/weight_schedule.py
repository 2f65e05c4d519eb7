"""Change the weights of methods during training."""

import math
from collections.abc import Sequence

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmkd.engine.distilled import distiller_of
from mmkd.errors import ConfigError
from mmkd.registry import HOOKS
from mmkd.utils import nearest

DECAYS = ('none', 'linear', 'cosine')


@HOOKS.register_module()
class WeightScheduleHook(Hook):
    r"""Scale the weights of methods over time.

    At time :math:`t` (in iterations, or in epochs and fractions of them) the
    weight is multiplied by

    .. math::
        \min(1, t / \text{warmup}) \cdot d(t), \qquad
        d = \begin{cases}
            1 & \text{none} \\
            1 - p & \text{linear} \\
            (1 + \cos \pi p) / 2 & \text{cosine}
        \end{cases}

    where :math:`p` runs from 0 at the end of the warm-up to 1 at ``stop_at``
    (by default the end of training). From ``stop_at`` on the weight is 0 and
    the teacher no longer runs.

    With ``every`` = N the methods run only in the iterations 0, N, 2N, …,
    with N times the weight, so that they pull as strongly on average. The
    iterations in between are stock ones, in which the teacher does not run.
    Where a method scales the student's own losses, it does so in the
    iterations in which it runs, as at its full weight.

    Args:
        methods: Names of the methods (or one name); all by default.
        warmup: Length of the linear warm-up, at least 0.
        decay: ``'none'``, ``'linear'`` or ``'cosine'``.
        stop_at: When the methods are switched off; never by default.
        by_epoch: Count in epochs, not in iterations; ``every`` always counts
            iterations.
        every: Run the methods only every Nth iteration, at least 1.

    Raises:
        ConfigError: If an option is outside its range or a method unknown.

    Example:
        >>> from mmkd.engine.hooks import WeightScheduleHook
        >>> custom_hooks = [
        ...     dict(type='mmkd.WeightScheduleHook', warmup=2, decay='linear')
        ... ]
        >>> hook = WeightScheduleHook(warmup=2, decay='linear')
        >>> [hook.factor(time, end=10) for time in (0, 1, 2, 6, 10)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    def __init__(
        self,
        *,
        methods: str | Sequence[str] | None = None,
        warmup: float = 0,
        decay: str = 'none',
        stop_at: float | None = None,
        by_epoch: bool = False,
        every: int = 1,
    ) -> None:
        if decay not in DECAYS:
            raise ConfigError(
                f'WeightScheduleHook.decay is {decay!r}. '
                f'{nearest(str(decay), DECAYS)}'
            )
        if warmup < 0:
            raise ConfigError(
                f'WeightScheduleHook.warmup must be at least 0, got {warmup}.'
            )
        if stop_at is not None and stop_at < warmup:
            raise ConfigError(
                f'WeightScheduleHook.stop_at ({stop_at}) must not come before '
                f'the end of the warm-up ({warmup}).'
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(
                'WeightScheduleHook.every must be a whole number of at least '
                f'1, got {every!r}.'
            )
        self.every = every
        self.methods = [methods] if isinstance(methods, str) else methods
        self.warmup, self.decay = warmup, decay
        self.stop_at, self.by_epoch = stop_at, by_epoch

    def factor(self, time: float, end: float) -> float:
        """Return the factor at ``time`` in a training that ends at ``end``."""
        if self.stop_at is not None:
            if time >= self.stop_at:
                return 0.0
            end = self.stop_at
        factor = min(1.0, time / self.warmup) if self.warmup else 1.0
        if end <= self.warmup:
            return factor
        part = min(max((time - self.warmup) / (end - self.warmup), 0.0), 1.0)
        if self.decay == 'linear':
            factor *= 1 - part
        elif self.decay == 'cosine':
            factor *= (1 + math.cos(math.pi * part)) / 2
        return factor

    def before_train(self, runner: Runner) -> None:
        known = distiller_of(runner).methods
        for name in self.methods or ():
            if name not in known:
                raise ConfigError(
                    f'WeightScheduleHook: there is no method "{name}". '
                    f'{nearest(name, known)}'
                )

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None
    ) -> None:
        time, end = float(runner.iter), float(runner.max_iters)
        if self.by_epoch:
            batches = len(runner.train_dataloader)
            time, end = time / batches, end / batches
        scales = distiller_of(runner).scales
        for name in self.methods or scales:
            runs = runner.iter % self.every == 0
            scales[name] = self.every * self.factor(time, end) * runs
