"""Where a training or a test waits, so that it can be killed at that moment.

The fixture ``hold`` is the file at which they wait, and its environment
variable; they go on once the file is gone.
"""

import os
import time
from pathlib import Path

from mmengine.hooks import IterTimerHook
from mmengine.runner import Runner

VARIABLE = 'MMKD_TESTS_HOLD'


def wait() -> None:
    """Wait for the end of the file, and let another file say so."""
    flag = Path(os.environ.get(VARIABLE, '/nowhere'))
    if flag.exists():
        reached(flag).touch()
    while flag.exists():
        time.sleep(0.05)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of another process, or 0 if it has ended.

    An instant of a process that is given by it does not depend on how busy
    the machine is.
    """
    try:
        return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid
    except OSError:
        return 0.0


def reached(flag: Path) -> Path:
    return flag.with_name('reached')


class Timer(IterTimerHook):
    """Stands in for ``default_hooks.timer`` and waits after one epoch."""

    def before_train_epoch(self, runner: Runner) -> None:
        if runner.epoch == 1:
            wait()
        super().before_train_epoch(runner)
