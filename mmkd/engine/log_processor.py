"""The lines of the training's log."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from mmengine.runner import LogProcessor, Runner

LEARNING_RATES = ('lr', 'base_lr')
"""What an optimiser's learning rates are called, behind its own name."""


class TrainingLog(LogProcessor):
    """MMEngine's log, with each loss where and when it belongs.

    MMEngine prints everything whose name ends in "lr" among the learning
    rates, such as the loss ``ld.loss_vlr``, and repeats for ever the last
    value of what is no longer computed, such as the losses of a method that
    :class:`~mmkd.engine.hooks.WeightScheduleHook` has stopped. Here only
    learning rates are printed as such, and a line has the losses, and the
    numbers of methods and teachers, that were computed since the line before.
    Everything else, and every option, is MMEngine's.
    """

    _seen: dict[str, np.ndarray]
    _held: dict[str, Any] | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._seen = {}
        self._silent: set[str] = set()

    def start(self, runner: Runner) -> None:
        """Take what a resumed run has restored as already printed."""
        self._seen = self._histories(runner)

    def get_log_after_iter(
        self, runner: Runner, batch_idx: int, mode: str
    ) -> tuple[dict[str, Any], str]:
        """Return the values of a line by name, and the line."""
        if mode != 'train':
            return super().get_log_after_iter(runner, batch_idx, mode)
        now = self._histories(runner)
        self._silent = {
            # An update replaces the array.
            key
            for key, history in now.items()
            if history is self._seen.get(key)
        }
        self._seen, self._held = now, {}
        try:
            tag, line = super().get_log_after_iter(runner, batch_idx, mode)
            held = self._held
        finally:
            self._held = None
        tag.update(held)
        for name, value in held.items():
            name = self._remove_prefix(name, f'{mode}/')
            line += f'  {name}: {value:.{self.num_digits}f}'
        return tag, line

    @staticmethod
    def _histories(runner: Runner) -> dict[str, np.ndarray]:
        """The history of each loss, and of what methods and teachers log."""
        return {
            key: buffer.data[0]
            for key, buffer in runner.message_hub.log_scalars.items()
            if key.startswith('train/') and is_computed(key)
        }

    def _collect_scalars(
        self,
        custom_cfg: list[dict],
        runner: Runner,
        mode: str,
        reserve_prefix: bool = False,
    ) -> dict[str, Any]:
        if self._held is None:
            return super()._collect_scalars(
                custom_cfg, runner, mode, reserve_prefix
            )
        scalars = runner.message_hub.log_scalars.items()
        spoken = {k: v for k, v in scalars if k not in self._silent}
        tag = super()._collect_scalars(
            custom_cfg,
            SimpleNamespace(message_hub=SimpleNamespace(log_scalars=spoken)),
            mode,
            reserve_prefix,
        )
        self._held = {
            name: tag.pop(name)
            for name in list(tag)
            if name.endswith('lr') and is_computed(name)
        }
        return tag


def is_computed(name: str) -> bool:
    """Whether a number comes from the model: a loss, or of a method.

    Example:
        >>> from mmkd.engine.log_processor import is_computed
        >>> [is_computed(name) for name in ('ld.loss_vlr', 'cache.hits')]
        [True, True]
        >>> [is_computed(name) for name in ('lr', 'generator.lr', 'time')]
        [False, False, False]
    """
    is_rate = name.rpartition('.')[2] in LEARNING_RATES
    return ('loss' in name or '.' in name) and not is_rate
