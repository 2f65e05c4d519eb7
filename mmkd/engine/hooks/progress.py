"""How far the training is, and what came of it."""

import logging
import resource
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process, master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from mmkd.engine.checkpoint import latest_checkpoint
from mmkd.engine.logs import main_metric, validations
from mmkd.errors import ConfigError
from mmkd.registry import HOOKS

SECONDS = 0.5
"""Between two updates of the line: each waits for the device."""


@HOOKS.register_module()
class ProgressHook(Hook):
    """A live line in a terminal, and a summary at the end.

    The line shows epoch, iteration, losses, remaining time and memory; it
    stands in for the training lines of the log, which stay as they are in
    the log file, and where the output is no terminal. The summary, which is
    logged, has the best and the last value of the main metric (COCO's AP,
    where there is one), the gain over another run, and the next commands.
    The runner registers the hook.

    Args:
        compare_with: Work dir of another training, such as the student's
            plain one, over which the gain is told.
        live: Show the line, where the output is a terminal.

    Raises:
        ConfigError: If ``compare_with`` is no folder.
    """

    priority = 'VERY_LOW'  # after the metrics of peers and the logger

    def __init__(
        self, *, compare_with: str | None = None, live: bool = True
    ) -> None:
        if compare_with is not None and not Path(compare_with).is_dir():
            raise ConfigError(
                f'ProgressHook.compare_with: there is no folder '
                f'{compare_with}. Give the work dir of a training.'
            )
        self.compare_with, self.live = compare_with, live
        self._bar: Any = None
        self._terminal = ExitStack()
        self._shown = 0.0

    def before_train(self, runner: Runner) -> None:
        if not (self.live and is_main_process() and sys.stdout.isatty()):
            return
        self._terminal.enter_context(logging_redirect_tqdm([runner.logger]))
        for handler in runner.logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.addFilter(_is_no_training_line)
        self._bar = tqdm(
            total=runner.max_iters,
            initial=runner.iter,
            file=sys.stdout,
            dynamic_ncols=True,
            mininterval=0,  # its owner decides
        )

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: object = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        if self._bar is None:
            return
        done, now = runner.iter + 1, time.monotonic()
        if now - self._shown < SECONDS and done < self._bar.total:
            return
        self._shown = now
        self._bar.set_description(_epoch(runner), refresh=False)
        self._bar.set_postfix_str(_described(outputs or {}), refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._terminal.close()

    @master_only
    def after_train(self, runner: Runner) -> None:
        self.close()
        runner.logger.info('\n'.join(['Done.', *self._summary(runner)]))

    def _summary(self, runner: Runner) -> list[str]:
        lines = []
        found = validations(Path(runner.work_dir))
        metric = main_metric(found[max(found)]) if found else None
        if metric is not None:
            values = {k: m[metric] for k, m in found.items() if metric in m}
            lines.append(f'{metric}: {_best_and_last(values)}')
            if self.compare_with is not None:
                lines.append(self._gain(metric, list(values.values())[-1]))
        checkpoint = latest_checkpoint(runner.work_dir)
        if checkpoint is not None:
            config = 'CONFIG'
            if runner.cfg.filename:  # MMEngine wrote a copy there
                name = Path(runner.cfg.filename).name
                config = str(Path(runner.work_dir, name))
            dirs = [*filter(None, [self.compare_with]), runner.work_dir]
            lines += [
                'Next:',
                f'  mmkd test {config} {checkpoint}',
                f'  mmkd report {" ".join(dirs)}',
            ]
        return lines

    def _gain(self, metric: str, last: float) -> str:
        theirs = [
            metrics[metric]
            for metrics in validations(Path(str(self.compare_with))).values()
            if metric in metrics
        ]
        if not theirs:
            return f'{self.compare_with} has no {metric} to compare with.'
        return (
            f'{self.compare_with}: last {theirs[-1]:.3f}, a gain of '
            f'{last - theirs[-1]:+.3f}'
        )


def _is_no_training_line(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return '  eta: ' not in text and not text.startswith('Exp name: ')


def _epoch(runner: Runner) -> str:
    loop = runner.train_loop
    if getattr(loop, '_epoch', None) is None or loop.max_epochs <= 1:
        return 'train'
    return f'epoch {runner.epoch + 1}/{loop.max_epochs}'


def _described(outputs: dict[str, Any]) -> str:
    """The losses of a step, the sum first, and the memory's peak."""
    losses = {k: v.item() for k, v in outputs.items() if 'loss' in k}
    total = losses.pop('loss', None)
    shown = [] if total is None else [f'loss {total:.3g}']
    shown += [f'{key} {value:.2g}' for key, value in losses.items()]
    return '  '.join([_memory(), *shown])


def _memory() -> str:
    if torch.cuda.is_available():
        mib = torch.cuda.max_memory_allocated() / 2**20
    else:
        mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return f'{mib / 1024:.1f} GiB'


def _best_and_last(values: dict[int, float]) -> str:
    best = max(values, key=values.__getitem__)
    last = max(values)
    return (
        f'best {values[best]:.3f} at {best}, last {values[last]:.3f} at {last}'
    )
