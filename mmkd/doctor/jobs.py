"""Tasks in processes of their own, each of which may fail, hang or die."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

Send = Callable[[Any], None]


@dataclass
class Job:
    """A task and its process."""

    task: Any
    process: Any
    receiver: Connection
    start: float = field(default_factory=time.monotonic)
    messages: list[Any] = field(default_factory=list)
    """What the process has sent."""
    hung: bool = False
    """Whether it was killed because it took too long."""

    @property
    def seconds(self) -> float:
        """How long the process has been running."""
        return time.monotonic() - self.start

    @property
    def ended_by(self) -> str:
        """The signal or the exit status that ended it; '' if all was well."""
        code = self.process.exitcode
        if not code:
            return ''
        return f'status {code}' if code > 0 else signal.Signals(-code).name

    def receive(self) -> None:
        """Take what was sent, before the pipe is full."""
        try:
            while self.receiver.poll():
                self.messages.append(self.receiver.recv())
        except EOFError:
            pass


def in_processes(
    tasks: Iterable[Any],
    work: Callable[[Any, Send], None],
    *,
    jobs: int = 1,
    patience: float,
) -> Iterator[Job]:
    """Work on each task in a process that is forked for it.

    Forked, because importing all again would take longer than most tasks.

    Args:
        tasks: What to work on.
        work: Is called in the process with a task, and with a function that
            sends a message to this process.
        jobs: How many processes run at a time.
        patience: Seconds after which a process is killed.

    Yields:
        The jobs, each when it has ended.
    """
    waiting, running = list(tasks), list[Job]()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_start(waiting.pop(0), work))
        wait([job.process.sentinel for job in running], timeout=1)
        for job in list(running):
            job.receive()
            if job.process.is_alive():
                if job.seconds > patience:
                    job.hung = True
                    job.process.kill()
                continue
            job.process.join()
            job.receive()
            running.remove(job)
            yield job


def _start(task: Any, work: Callable[[Any, Send], None]) -> Job:
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_run, args=(task, work, sender), daemon=True
    )
    process.start()
    sender.close()
    return Job(task, process, receiver)


def _run(
    task: Any, work: Callable[[Any, Send], None], sender: Connection
) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    work(task, sender.send)
