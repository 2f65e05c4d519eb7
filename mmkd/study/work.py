"""What is due in a study, and the work on it."""

import contextlib
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mmkd.engine.logs import training_rows
from mmkd.engine.preemption import SIGNALS
from mmkd.errors import ConfigError, MMKDError

from .file import is_mapping
from .inputs import versions
from .run import INPUTS, SOFTWARE, Run, Tested
from .step import Step, now, read_json, stop, write_json
from .study import Study

REMOVED = '.removed-'
"""The names of folders that are being removed begin with it."""
COST = ('training_seconds', 'training_cpu_seconds', 'memory_mib', 'memory_of')

# -------------------------------------------------------------- what is due


def status(run: Run, keep_stale: bool) -> str:
    """Say ``done``, or else why the run is due."""
    if run.needed is not None and not is_done(run.needed, keep_stale):
        return f'waits for {run.needed.name}'
    changed = run.changed()
    if run.result and not changed:
        return 'done'
    if run.result and keep_stale and SOFTWARE.issuperset(changed):
        return f'done, but stale and kept: {in_words(changed)} changed'
    if changed:
        what = 'stale' if run.result else 'begun anew'
        text = f'{what}: {in_words(changed)} changed'
    elif isinstance(run, Tested):
        text = 'is to be tested'
    else:
        text = 'is continued' if run.noted else 'is to be trained'
    return f'{text}, but {run.lacking}' if run.lacking else text


def is_done(run: Run, keep_stale: bool) -> bool:
    return status(run, keep_stale).startswith('done')


def in_words(changed: Sequence[str]) -> str:
    return ' and '.join(INPUTS[key] for key in changed)


def tell_plan(study: Study, keep_stale: bool) -> None:
    """Say of every run whether it is done, and if not, why it is due."""
    for each in study.pretrainings.values():
        print(f'{each.name}: {each.status(keep_stale=keep_stale)}')
    width = max(len(run.name) for run in study.runs) + 2
    texts = [status(run, keep_stale) for run in study.runs]
    for run, text in zip(study.runs, texts, strict=True):
        print(f'{run.name:<{width}}{text}', flush=True)
    if stale := sum(text.startswith('stale') for text in texts):
        print(
            f'{stale} results are stale; they are removed and run again '
            'when it is their turn (--keep-stale keeps those of which only '
            'the code or packages changed).',
            flush=True,
        )


# ------------------------------------------------------------------ the work


def execute(
    study: Study,
    jobs: int,
    lock: int,
    *,
    keep_stale: bool,
    stop_at_failure: bool = False,
) -> None:
    """Do what is due, as many runs at a time as there are jobs.

    Where a run fails, its ``failure`` says why. The others go on, or are
    ended with ``stop_at_failure``.
    """
    for each in study.pretrainings.values():
        needed = any(
            run.pretrained is each and not is_done(run, keep_stale)
            for run in study.runs
        )
        each.complete(lock, needed=needed, keep_stale=keep_stale)
    waiting = list(study.runs)
    running: list[Run] = []
    due = [run.name for run in waiting if not is_done(run, keep_stale)]
    with progress(due) as tell:
        try:
            while waiting or running:
                if stop_at_failure and any(run.failure for run in study.runs):
                    break
                for run in list(waiting):
                    ready = run.needed not in (*waiting, *running)
                    if ready and len(running) < jobs:
                        waiting.remove(run)
                        if prepare(run, keep_stale):
                            start(run, lock)
                            running.append(run)
                            tell(run.name, 'starts')
                    if run.failure:
                        tell(run.name, 'failed')
                time.sleep(0.2)
                for run in list(running):
                    if advance(run, study, lock):
                        running.remove(run)
                    tell(run.name, describe(run, study))
        finally:
            stop([run.step for run in running if run.step])


def prepare(run: Run, keep_stale: bool) -> bool:
    """Clear the way for a run; False if nothing is to be run."""
    try:
        if run.needed is not None and run.needed.failure:
            run.failure = f'not run: {run.needed.name} failed'
            return False
        if is_done(run, keep_stale):
            return False
        if run.lacking:
            raise ConfigError(f'not run: {run.lacking}')
        run.fetch()
        if run.changed():
            remove(run.folder)
        else:
            run.next_step.count_lost_time()
        run.write_config()
    except (MMKDError, OSError) as error:
        run.failure = str(error)
    return not run.failure


def remove(folder: Path) -> None:
    """Remove a folder, which is no run's any more if this is broken off."""
    aside = folder.with_name(f'{REMOVED}{folder.name}')
    folder.rename(aside)
    shutil.rmtree(aside)


def remove_leftovers(work_dir: Path) -> None:
    """Finish the removals that were broken off."""
    for folder in work_dir.glob(f'{REMOVED}*'):
        shutil.rmtree(folder, ignore_errors=True)


def start(run: Run, lock: int) -> None:
    run.step = run.next_step
    if run.step.name == 'test':
        shutil.rmtree(run.folder / 'test', ignore_errors=True)
    run.step.start(lock)


def advance(run: Run, study: Study, lock: int) -> bool:
    """Start a run's next step if one has ended; True if none is left."""
    assert run.step
    if not run.step.ended():
        return False
    conclude(run, run.step, study)
    if run.failure or run.result:
        return True
    start(run, lock)
    return False


def conclude(run: Run, step: Step, study: Study) -> None:
    """Note what has come of a step: a failure, a result, or a training."""
    assert step.process
    if code := step.process.returncode:
        what = {'train': 'training', 'test': 'testing'}[step.name]
        run.failure = f'{what} {in_word(code)}, see {step.log}'
    elif step.name == 'test':
        write_result(run, step, study)
    elif run.checkpoint is None:
        run.failure = f'training left no checkpoint, see {step.log}'


def in_word(status: int) -> str:
    """Say how a process has ended that has not done what it should."""
    if status - 128 in SIGNALS:
        name = signal.Signals(status - 128).name
        return f'was ended by {name}, and goes on with the same command'
    return f'failed (exit status {status})'


def write_result(run: Run, step: Step, study: Study) -> None:
    files = sorted((run.folder / 'test').glob('*/*.json'))
    metrics = read_json(files[-1]) if files else {}
    missing = [key for key in study.metrics.values() if key not in metrics]
    if missing:
        known = ', '.join(key for key in metrics if '/' in key)
        run.failure = (
            f'the test gave no {", ".join(missing)}, but '
            f'{known or "nothing, as with a detector that finds nothing"}; '
            f'see {step.log}'
        )
        return
    result = {
        'run': run.network,
        'seed': run.seed,
        'metrics': metrics,
        **cost_of(run),
        'test_seconds': step.state['wall_seconds'],
        'checkpoint': run.checkpoint_hash,
        'inputs': run.noted['fingerprint'],
        'versions': versions(),
        'finished': now(),
    }
    write_json(run.folder / 'result.json', result)


def cost_of(run: Run) -> dict[str, Any]:
    """Return what the training cost, which may be that of another run."""
    if isinstance(run, Tested):
        theirs = run.source.result
        return {'trained_in': run.source.name} | {k: theirs[k] for k in COST}
    on_gpu = [row.get('memory', 0) for row in training_rows(run.folder)]
    peak = max(on_gpu, default=0)
    return {
        'training_seconds': run.noted['wall_seconds'],
        'training_cpu_seconds': run.noted['cpu_seconds'],
        'memory_mib': peak or run.noted['peak_mib'],
        'memory_of': 'GPU' if peak else 'process',
    }


# ------------------------------------------------------------------ progress


@contextlib.contextmanager
def progress(names: Sequence[str]) -> Iterator[Callable[[str, str], None]]:
    """Show a line for each run, redrawn on a terminal, else one per epoch.

    Yields:
        A function that takes a name and its new line.
    """
    lines = dict.fromkeys(names, 'waits')
    console = Console()
    width = max([11, *(len(name) + 2 for name in names)])

    def drawn() -> Table:
        """Draw the last runs that no longer wait, as many as fit."""
        table = Table.grid()
        shown = [item for item in lines.items() if item[1] != 'waits']
        for name, line in shown[-console.height + 2 :]:
            table.add_row(f'{name:<{width}}', Text(line, overflow='ellipsis'))
        table.add_row(f'{len(lines) - len(shown)} wait')
        return table

    def tell(name: str, line: str) -> None:
        old, lines[name] = lines.get(name, ''), line
        if line.split('loss')[0] != old.split('loss')[0]:
            print(f'{name:<{width}}{line}', flush=True)

    def draw(name: str, line: str) -> None:
        lines[name] = line

    if console.is_terminal:
        with Live(get_renderable=drawn, console=console):
            yield draw
    else:
        yield tell


def describe(run: Run, study: Study) -> str:
    """Describe in one line how far a run is."""
    if run.failure:
        return 'failed'
    if result := run.result:
        return '   '.join(
            f'{name} {100 * result["metrics"][key]:.1f}'
            for name, key in study.metrics.items()
        )
    if run.step and run.step.name == 'test':
        return 'is tested'
    settings = run.config.get('train_cfg')
    epochs = settings.get('max_epochs') if is_mapping(settings) else None
    text = ''
    with contextlib.suppress(FileNotFoundError):
        text = (run.folder / 'train.txt').read_text(errors='replace')
    return last_progress(text, epochs) if epochs else 'is trained'


def last_progress(log: str, epochs: int) -> str:
    """Return the newest epoch, loss, time left and AP of MMEngine's log."""
    trained = re.findall(
        r'Epoch\(train\) +\[(\d+)\].* eta: (.+?)  .* loss: (\S+)', log
    )
    if not trained:
        return 'starts'
    epoch, left, loss = trained[-1]
    line = f'epoch {epoch:>2} of {epochs}   loss {loss}   {left} left'
    validated = re.findall(r'Epoch\(val\).* coco/bbox_mAP: (\S+)', log)
    if validated:
        line += f'   AP {100 * float(validated[-1]):.1f}'
    return line
