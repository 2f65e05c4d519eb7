"""End a training on a signal, with a checkpoint to go on from.

Schedulers of clusters, spot machines and people end a process by a signal and
leave it a while. The training then ends after the current iteration, at the
same one in all processes, and everything is saved.
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.util import register_after_fork
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.runner import Runner
from mmengine.utils import is_method_overridden
from torch.utils.data import DataLoader

from mmkd.data.files import write_text

from .hooks.safe_checkpoint import peers_of

SIGNALS = tuple(
    getattr(signal, name)
    for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1', 'SIGUSR2')
    if hasattr(signal, name)
)
"""What ends a training."""
DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
"""The handlers that are replaced; others stay."""
FILENAME = 'preempted.pth'
"""The checkpoint, which goes once the next regular one is there."""
SAME = 1.0
"""Seconds within which a second signal is the first one: launchers pass on
what a process of the same group has got from the system as well."""
EXCHANGED_EVERY = 0.5
"""Seconds between two exchanges of processes whose iterations are short; an
exchange takes a few tenths of a millisecond."""
ASKED_EVERY = 1.0
"""Seconds between two looks at what other processes have got."""
KNOWN = ('mmengine', 'mmdet', 'mmkd')
"""Packages whose hooks change nothing for a validation but EMAHook's swap."""


class Preempted(SystemExit):
    """The training has been ended by a signal.

    Its code is the status with which a process ends that a signal has ended,
    as shells give it: 128 and the signal's number.
    """


class PreemptionHook(Hook):
    """Saves and ends the training after a signal.

    Of several processes each may get the signal, or only one. They agree
    after an iteration, on their hosts, without waiting: what they have
    exchanged after one is read after the next one. Where iterations are
    short, they do so twice a second.

    A validation is broken off. What is saved is what was there before it, so
    that the resumed run validates again.

    Args:
        forget_validation: Is called before the checkpoint is saved, if a
            validation is broken off.

    Attributes:
        complete: Epoch, iteration and path of the newest checkpoint from
            which this training can go on.
    """

    priority = 'LOWEST'

    def __init__(
        self, forget_validation: Callable[[], None] = lambda: None
    ) -> None:
        self.complete: tuple[int, int, str] | None = None
        self._forget_validation = forget_validation
        self._received = 0
        self._when = 0.0
        self._begun = False
        self._pid = os.getpid()
        self._former: dict[int, Any] = {}
        self._group: Any = None
        self._sent: tuple[torch.Tensor, Any] | None = None
        self._when_sent = 0.0
        self._between = self._left = 1
        self._asked = 0.0
        self._validations = 0
        self._breakable = False
        self._leftover: str | None = None

    # -- signals -----------------------------------------------------------

    @contextlib.contextmanager
    def watching(self, runner: Runner) -> Iterator[None]:
        """Let signals end the training within the context.

        Raises:
            Preempted: If a signal has ended it; KeyboardInterrupt instead,
                if it was SIGINT.
        """
        self._received, self._begun, self._pid = 0, False, os.getpid()
        self._sent, self._between, self._left = None, 1, 1
        if threading.current_thread() is threading.main_thread():
            self._take_over(runner)
            register_after_fork(self, PreemptionHook._after_fork)
        if get_world_size() > 1:
            self._group = dist.new_group(backend='gloo')
        try:
            yield
        except (Preempted, KeyboardInterrupt) as error:
            traceback.clear_frames(error.__traceback__)
            _end_workers(runner)
            if self._received and not self._begun:
                checkpoint = _resumed(runner) if runner._resume else None
                self._tell(
                    runner, self._received, _ends(runner, 0, checkpoint)
                )
            raise
        finally:
            for number, handler in self._former.items():
                signal.signal(number, handler)
            self._former.clear()
            evaluator = getattr(runner._val_loop, 'evaluator', None)
            vars(evaluator).pop('evaluate', None) if evaluator else None
        if self._received:
            self._end(runner, self._received, 'The training is complete.')

    def _take_over(self, runner: Runner) -> None:
        kept = []
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler in DEFAULTS:
                self._former[number] = signal.signal(number, self._receive)
            elif handler is not signal.SIG_IGN:
                kept.append(signal.Signals(number).name)
        if kept:
            runner.logger.info(
                f'{", ".join(kept)} has a handler already, which stays: the '
                'training does not save a checkpoint by itself when it comes'
            )

    def _receive(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:  # it was forked just now
            _die(number)
        now = time.monotonic()
        if self._received and now - self._when < SAME:
            return
        if self._received:
            _end_at_once(number)
        self._received, self._when = number, now
        if not self._begun and self._group is None:
            raise _ending(number)
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):
            # A handler must not print, because printing may be interrupted.
            os.write(
                2,
                f'\n{name}: the training ends after this iteration, with a '
                'checkpoint. A second signal ends it at once.\n'.encode(),
            )

    def _after_fork(self) -> None:
        """Let a forked process, such as a pool's, be ended by its parent."""
        if self._former:
            _obey_parent_alone()

    # -- agreement ---------------------------------------------------------

    def _agreed(self) -> int:
        """Return the signal that any process had at the last exchange."""
        if self._group is None:
            return self._received
        self._left -= 1
        if self._left > 0:
            return 0
        number, seconds = _read(self._sent)
        last, self._when_sent = self._when_sent, time.monotonic()
        mine = (self._when_sent - last) / self._between
        # All have read the same, so that all count the same iterations.
        self._between = self._left = _iterations(seconds)
        self._sent = self._send(mine)
        return number

    def _agreed_now(self) -> int:
        """Return the signal that any process has, and wait for all."""
        if self._group is None:
            return self._received
        number, _ = _read(self._sent)
        self._sent = None
        return max(number, _read(self._send())[0])

    def _send(self, seconds: float = 0.0) -> tuple[torch.Tensor, Any]:
        """Start to find the largest signal and time of an iteration."""
        both = torch.tensor([self._received, seconds], dtype=torch.float64)
        maximum = dist.ReduceOp.MAX
        return both, dist.all_reduce(both, maximum, self._group, async_op=True)

    def _is_told(self) -> bool:
        """Return whether a process breaks this validation off.

        Processes may validate different numbers of batches, so that they
        cannot exchange anything after each.
        """
        if self._group is None:
            return bool(self._received)
        store = dist.distributed_c10d._get_default_store()
        key = f'mmkd/preempted/{self._validations}'
        if self._received:
            store.set(key, 'yes')
            return True
        now = time.monotonic()
        if now - self._asked < ASKED_EVERY:
            return False
        self._asked = now
        return store.check([key])

    # -- the moments -------------------------------------------------------

    def before_train(self, runner: Runner) -> None:
        self._begun, self._when_sent = True, time.monotonic()
        for loop in (runner.train_loop, runner.val_loop):
            if loop is not None:
                _guard(loop.dataloader)
        self._watch_validation(runner)
        if runner.iter:
            self.complete = runner.epoch, runner.iter, _resumed(runner)
        folder = _folder(runner)
        if '://' not in folder and Path(folder, FILENAME).is_file():
            self._leftover = _last(runner)
        if number := self._agreed_now():
            self._stop(runner, number, runner.epoch, runner.iter)

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        self._remove_leftover(runner)
        if number := self._agreed():
            self._agreed_now()
            self._stop(runner, number, runner.epoch, runner.iter + 1)

    def after_train_epoch(self, runner: Runner) -> None:
        self._remove_leftover(runner)

    def before_val(self, runner: Runner) -> None:
        self._validations += 1
        if number := self._agreed_now():
            self._stop(runner, number, runner.epoch, runner.iter)

    def before_val_epoch(self, runner: Runner) -> None:
        self._breakable = 'evaluate' in vars(
            getattr(runner.val_loop, 'evaluator', runner)
        ) and not any(_changes_validation(hook) for hook in runner.hooks)

    def after_val_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        if self._breakable and self._is_told():
            self._break_validation(runner)

    def after_train(self, runner: Runner) -> None:
        # What other processes have got: all end alike.
        self._received = self._agreed_now()

    def _watch_validation(self, runner: Runner) -> None:
        evaluator = getattr(runner.val_loop, 'evaluator', None)
        if evaluator is None:
            return
        evaluate = evaluator.evaluate

        @functools.wraps(evaluate)
        def agreed(*args: Any, **options: Any) -> Any:
            self._break_validation(runner)
            return evaluate(*args, **options)

        evaluator.evaluate = agreed

    def _break_validation(self, runner: Runner) -> None:
        """Break a validation off if any process wants to.

        All come here, some when they have validated all of their images.
        """
        if not self._breakable:
            return
        self._breakable = False
        if number := self._agreed_now():
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):
                    hook.after_val_epoch(runner)  # give the weights back
            self._forget_validation()
            self._stop(runner, number, runner.epoch, runner.iter)

    # -- the end -----------------------------------------------------------

    def _stop(
        self, runner: Runner, number: int, epoch: int, iteration: int
    ) -> None:
        path = None
        if self.complete and self.complete[:2] == (epoch, iteration):
            path = self.complete[2]
        elif iteration:
            path = _save(runner, epoch, iteration)
        if self._group is not None:
            dist.barrier(self._group)  # launchers end all after the first
        self._end(runner, number, _ends(runner, iteration, path))

    def _end(self, runner: Runner, number: int, text: str) -> None:
        self._tell(runner, number, text)
        self._received = 0
        raise _ending(number)

    def _tell(self, runner: Runner, number: int, text: str) -> None:
        name = signal.Signals(number).name
        runner.logger.warning(f'The training has got {name}. {text}')

    def _remove_leftover(self, runner: Runner) -> None:
        """Remove the checkpoint of a signal once a regular one is there."""
        if self._leftover is None or self._leftover == _last(runner):
            return
        self._leftover = None
        if is_main_process():
            for network in ('', *peers_of(runner)):
                path = Path(_folder(runner), network, FILENAME)
                path.unlink(missing_ok=True)


def _ends(runner: Runner, iteration: int, checkpoint: str | None) -> str:
    """Say where a training ends, and how to go on."""
    if iteration:
        what = f'after {iteration} iterations. All of it is in {checkpoint}.'
    elif checkpoint:
        what = 'before its first iteration.'
    else:
        what = 'before its first iteration, and there is nothing to save.'
    return f'It ends {what} {how_to_go_on(runner, checkpoint)}'


def how_to_go_on(runner: Runner, checkpoint: str | None) -> str:
    """Say which command continues a training that was started by another.

    Args:
        runner: The runner of the training.
        checkpoint: Where it goes on; None to start again.
    """
    option: list[str] = []
    if checkpoint is not None:
        pointer = Path(runner.work_dir, 'last_checkpoint')
        named = pointer.read_text().strip() if pointer.is_file() else ''
        option = ['--resume'] + [checkpoint] * (named != checkpoint)
    if get_world_size() > 1 and os.environ.get('GROUP_WORLD_SIZE') != '1':
        more = f' and {shlex.join(option)}' if option else ''
        return f'To go on, start the job with the same command{more}.'
    return f'To go on: {shlex.join([*_command(runner), *option])}'


def _command(runner: Runner) -> list[str]:
    """Return the command of this process, without an option to resume."""
    script, *arguments = sys.argv
    name, folder = Path(script).name, Path(script).absolute().parent.name
    python = 'python' if shutil.which('python') == sys.executable else ''
    start = [python or sys.executable]
    if os.environ.get('GROUP_WORLD_SIZE') == '1' and get_world_size() > 1:
        start = ['torchrun', '--standalone', '--nproc_per_node']
        start.append(str(get_world_size()))
    if name == 'train.py':
        return [*start, script, *_without_resume(arguments)]
    is_mmkd = name == 'mmkd' or (name, folder) == ('__main__.py', 'mmkd')
    if get_world_size() == 1 and shutil.which('mmkd'):
        start = ['mmkd']
    elif start[0] == 'torchrun':
        start += ['--no_python', 'mmkd'] if name == 'mmkd' else ['-m', 'mmkd']
    else:
        start += ['-m', 'mmkd']
    if is_mmkd and arguments[:1] == ['train']:
        return [*start, *_without_resume(arguments)]
    dumped = Path(runner.cfg.filename or f'{runner.timestamp}.py').name
    config = str(Path(runner.work_dir, dumped))
    return [*start, 'train', config, '--work-dir', runner.work_dir]


def _without_resume(arguments: list[str]) -> list[str]:
    kept: list[str] = []
    after = False
    for word in arguments:
        name, value = word.partition('=')[::2]
        if len(name) > 2 and '--resume'.startswith(name):
            after = not value
        elif word.startswith('-') or not after:
            kept.append(word)
            after = False
        else:
            after = False  # the checkpoint
    return kept


def _save(runner: Runner, epoch: int, iteration: int) -> str:
    """Save everything; return the path, which last_checkpoint names."""
    hook = _checkpoint_hook(runner)
    folder = _folder(runner)
    options = {'backend_args': hook.backend_args} if hook else {}
    runner.save_checkpoint(
        folder,
        FILENAME,
        save_param_scheduler=runner.param_schedulers is not None,
        meta={'epoch': epoch, 'iter': iteration},
        by_epoch=False,
        **options,
    )
    path = f'{folder.rstrip("/")}/{FILENAME}'
    if is_main_process():
        write_text(Path(runner.work_dir, 'last_checkpoint'), path)
    return path


def _checkpoint_hook(runner: Runner) -> CheckpointHook | None:
    hooks = (hook for hook in runner.hooks if isinstance(hook, CheckpointHook))
    return next(hooks, None)


def _folder(runner: Runner) -> str:
    """Return where the checkpoints of a run are."""
    hook = _checkpoint_hook(runner)
    return str((hook and hook.out_dir) or runner.work_dir)


def _last(runner: Runner) -> str:
    """Return the last regular checkpoint that was saved."""
    return str(runner.message_hub.runtime_info.get('last_ckpt', ''))


def _resumed(runner: Runner) -> str:
    """Return the checkpoint that a run has resumed."""
    pointer = Path(runner.work_dir, 'last_checkpoint')
    named = pointer.read_text().strip() if pointer.is_file() else ''
    return str(runner._load_from or named)


def _changes_validation(hook: Hook) -> bool:
    """Return whether a hook may have to act after a validation it begins."""
    package = type(hook).__module__.partition('.')[0]
    return package not in KNOWN and any(
        is_method_overridden(event, Hook, hook)
        for event in ('before_val', 'before_val_epoch')
    )


def _read(sent: tuple[torch.Tensor, Any] | None) -> tuple[int, float]:
    if sent is None:
        return 0, 0.0
    both, work = sent
    work.wait()
    number, seconds = both.tolist()
    return int(number), seconds


def _iterations(seconds: float) -> int:
    """Return after how many iterations processes exchange again."""
    return min(max(int(EXCHANGED_EVERY / seconds), 1), 100) if seconds else 1


def _ending(number: int) -> BaseException:
    if number == signal.SIGINT:
        return KeyboardInterrupt()
    return Preempted(128 + number)


# ------------------------------------------------------------------- workers


def _guard(loader: DataLoader) -> None:
    """Let only this process end the workers of a loader.

    Signals often go to a whole group of processes.
    """
    if loader.num_workers and hasattr(signal, 'sigwaitinfo'):
        loader.worker_init_fn = functools.partial(
            _init_worker, loader.worker_init_fn
        )


def _init_worker(init: Callable[[int], None] | None, worker_id: int) -> None:
    _obey_parent_alone()
    if init is not None:
        init(worker_id)


def _obey_parent_alone() -> None:
    """Leave all signals but those of the parent to the parent."""
    if signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS):
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while True:
        if signal.sigwaitinfo(SIGNALS).si_pid == os.getppid():
            os._exit(0)


def _end_workers(runner: Runner) -> None:
    """End the workers of the loaders, whose iterators nobody needs."""
    for loop in (runner._train_loop, runner._val_loop):
        for name in ('dataloader', 'dataloader_iterator'):
            holder: Any = getattr(loop, name, None)
            if hasattr(holder, '_iterator'):
                holder._iterator = None
    if multiprocessing.active_children():
        gc.collect()


def _end_at_once(number: int) -> None:
    """End this process by a signal, and its workers before it."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
    _die(number)


def _die(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
