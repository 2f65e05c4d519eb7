"""Show how far a training is, and sum up its results at the end."""

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
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from mmkd.engine.checkpoint import checkpoint_folders
from mmkd.engine.logs import main_metric, validations
from mmkd.engine.next_steps import next_steps
from mmkd.errors import ConfigError
from mmkd.registry import HOOKS

SECONDS = 0.5
"""Time between two updates of the line, as each waits for the device."""


@HOOKS.register_module()
class ProgressHook(Hook):
    """A live line in a terminal, and a summary at the end.

    The line shows the epoch, the iteration, the remaining time, the peak of
    the memory and the losses. It replaces the training lines of the log in a
    terminal; in the log file, and where the output is not a terminal, these
    stay as they are. Of several processes, only the first shows it. The
    summary is logged. It gives the best and the last value of the main metric
    (COCO's AP, if there is one), the gain over another run, and the next
    commands. The runner registers the hook.

    Args:
        compare_with: The work dir of another training, such as that of the
            plain student, with which the last value is compared.
        live: Show the line if the output is a terminal.
        commands: Name the next commands in the summary, which are those for
            a detector.

    Raises:
        ConfigError: If ``compare_with`` is no folder.
    """

    priority = 'VERY_LOW'  # after the metrics of peers and the logger

    def __init__(
        self,
        *,
        compare_with: str | None = None,
        live: bool = True,
        commands: bool = True,
    ) -> None:
        if compare_with is not None and not Path(compare_with).is_dir():
            raise ConfigError(
                f'ProgressHook.compare_with: there is no folder '
                f'{compare_with}. Give the work dir of a training.'
            )
        self.compare_with, self.live = compare_with, live
        self.commands = commands
        self._bar: Progress | None = None
        self._terminal = ExitStack()
        self._shown = 0.0

    def before_train(self, runner: Runner) -> None:
        if not (self.live and is_main_process() and sys.stdout.isatty()):
            return
        self._bar = Progress(
            TextColumn('{task.description}: {task.percentage:.0f}%'),
            BarColumn(10),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn(
                '{task.fields[state]}',
                markup=False,
                table_column=Column(ratio=1, no_wrap=True),
            ),
            console=Console(file=sys.stdout, soft_wrap=True),
            expand=True,
            # Processes that load data are forked, and would inherit the lock
            # of a thread.
            auto_refresh=False,
            redirect_stderr=False,  # it may be a file
        )
        self._bar.add_task(
            'train', total=runner.max_iters, completed=runner.iter, state=''
        )
        self._terminal.enter_context(self._bar)
        self._bar.console.show_cursor()  # a killed process could not do that
        for handler in runner.logger.handlers:
            if isinstance(handler, logging.FileHandler):
                continue
            # The line has replaced sys.stdout by what writes above it.
            old = handler.setStream(sys.stdout)
            self._terminal.callback(handler.setStream, old)
            handler.addFilter(_is_no_training_line)
            self._terminal.callback(handler.removeFilter, _is_no_training_line)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: object = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        if self._bar is None:
            return
        (task,) = self._bar.tasks
        done, now = runner.iter + 1, time.monotonic()
        if now - self._shown < SECONDS and done < task.total:
            return
        self._shown = now
        self._bar.update(
            task.id,
            completed=done,
            description=_epoch(runner),
            state=_described(outputs or {}),
            refresh=True,
        )

    def close(self) -> None:
        """Give the terminal back."""
        self._terminal.close()
        self._bar = None

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
        if not self.commands:
            return lines
        config = 'CONFIG'
        if runner.cfg.filename:  # it lies there, or MMEngine wrote a copy
            name = Path(runner.cfg.filename).name
            config = str(Path(runner.work_dir, name))
        return lines + next_steps(
            config,
            runner.work_dir,
            *checkpoint_folders(runner.hooks),
            compare_with=self.compare_with,
        )

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
    """The memory's peak and the losses of a step, their sum first."""
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
