"""Train and test a grid of networks and seeds; compare them in one table.

Examples:
    mmkd study studies/bccd_frcnn.yaml --jobs 2
    mmkd study studies/bccd_frcnn.yaml --dry-run

The file names the runs (a config, the run that is its teacher, options), the
seeds, the metrics and the run that the others are compared with. Each run is
``mmkd train`` with ``randomness.seed`` and ``mmkd test`` with its
last checkpoint, nothing selected, in ``WORK_DIR/<run>-seed<k>``; a student
has the teacher of its seed. A run that is ``of`` another only tests a peer of
it (``network``), or several of its networks as one (``ensemble``). Ctrl-C
stops a study; run again, it continues, and what is done is not done again
unless its config, data, teacher, peers, the code of mmkd or the installed
packages have changed. Writes table.md and table.json to the work dir; the
exit status is 1 if a run has failed.

A grid: a run with ``each`` (named options), ``teachers`` or ``data`` (named
options of the study, for all runs) is a row for each combination.

    baseline: student
    data:
      bccd:  # as in the configs
      voc: {train_dataloader.dataset.data_root: data/voc/}
    runs:
      big: {config: big.py}
      huge: {config: huge.py}
      student: {config: student.py}
      kd:
        config: kd.py
        teachers: [big, huge]
        each:
          warm: {distillation.methods.kd.temperature: 1.0}
          hot: {distillation.methods.kd.temperature: 4.0}

These are big-bccd, big-voc, huge-bccd, ..., kd-warm-big-bccd, ...,
kd-hot-huge-voc: 14 rows, each with all seeds. A row's teacher and the row
that it is compared with are those with its data. ``of: kd`` tests a network
of each of its rows; ``of``, ``teacher`` and ``baseline`` take the name of
one row, too. A run's own ``data`` are the data that it is for, with further
options. Where options meet, those in ``each`` win over those of the run's
data, these over those of the study's data and of the run.
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# One thread a process: more of them wait for each other on a busy machine.
os.environ.setdefault('OMP_NUM_THREADS', '1')

from mmkd.errors import CheckpointError, ConfigError

from .cost import cost_of, note_begun, note_lost_time, note_running
from .run import INPUTS, SOFTWARE, Run, Tested, libraries
from .study import Study, read_study
from .table import write_table
from .training import (
    DemoError,
    Progress,
    Training,
    last_progress,
    locked,
    now,
    read_json,
    stop,
    versions,
    write_json,
)

REMOVED = '.removed-'
"""Begins the names of folders that are being removed."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='mmkd study',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'study', type=lambda path: Path(path).resolve(), help='YAML file'
    )
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time')
    parser.add_argument(
        '--keep-stale',
        action='store_true',
        help='keep, and mark in the table, results of which only the code of '
        'mmkd or the installed packages have changed',
    )
    parser.add_argument(
        '--dry-run',
        action='store_true',
        help='only say what is done and what would be run, and why',
    )
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error('--jobs takes a number from 1')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))
    try:
        study = read_study(args.study)
        if args.dry_run:
            tell_plan(study, args.keep_stale)
            return 0
        with locked(study.work_dir) as lock:
            remove_leftovers(study.work_dir)
            tell_plan(study, args.keep_stale)
            try:
                execute(study, args.jobs, lock, args.keep_stale)
            finally:
                text = write_table(study)
    except (ConfigError, CheckpointError, DemoError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = 'Run the same command again to continue.'
        print(f'\nInterrupted. {again}', file=sys.stderr)
        return 130
    print(f'\n{text}\n{os.path.relpath(study.work_dir / "table.md")}')
    return int(any(run.failure for run in study.runs))


# -------------------------------------------------------------- what is due


def status(run: Run, keep_stale: bool) -> str:
    """``done``, or else why it is run: in words, for the user."""
    if run.needed is not None:
        theirs = status(run.needed, keep_stale)
        if not is_done(theirs):
            return f'waits for {run.needed.name}'
    changed = run.changed()
    if changed and keep_stale and run.result and SOFTWARE.issuperset(changed):
        return f'done, but stale and kept: {in_words(changed)} changed'
    if run.result and not changed:
        return 'done'
    text = why_due(run, changed)
    return f'{text}, but {run.lacking}' if run.lacking else text


def why_due(run: Run, changed: Sequence[str]) -> str:
    if changed:
        what = 'stale' if run.result else 'begun anew'
        return f'{what}: {in_words(changed)} changed'
    if isinstance(run, Tested):
        return 'is to be tested'
    return 'is continued' if run.noted else 'is to be trained'


def is_done(text: str) -> bool:
    return text.startswith('done')


def in_words(changed: Sequence[str]) -> str:
    return ' and '.join(INPUTS[key] for key in changed)


def tell_plan(study: Study, keep_stale: bool) -> None:
    """Say of every run whether it is done, and if not, why it is run."""
    width = max(len(run.name) for run in study.runs) + 2
    texts = [status(run, keep_stale) for run in study.runs]
    for run, text in zip(study.runs, texts, strict=True):
        print(f'{run.name:<{width}}{text}', flush=True)
    stale = [text for text in texts if text.startswith('stale')]
    if stale:
        print(
            f'{len(stale)} results are stale; they are removed and run again '
            'when it is their turn (--keep-stale keeps those of which only '
            'the code or packages changed).',
            flush=True,
        )


# ----------------------------------------------------------------- running


def execute(study: Study, jobs: int, lock: int, keep_stale: bool) -> None:
    """Run what is not done, as many at a time as there are jobs."""
    waiting = list(study.runs)
    running: list[tuple[Run, Training]] = []
    progress = Progress(
        [r.name for r in waiting if not is_done(status(r, keep_stale))]
    )
    try:
        while waiting or running:
            for run in list(waiting):
                if len(running) < jobs and is_ready(run, waiting, running):
                    waiting.remove(run)
                    if prepare(run, keep_stale):
                        start(run, running, lock)
                        progress.tell(run.name, 'starts')
                if run.failure:
                    progress.tell(run.name, 'failed')
            time.sleep(0.2)
            for run, training in list(running):
                step = training.network
                if training.ended():
                    running.remove((run, training))
                    conclude(run, training, study)
                    if not run.failure and not run.result:
                        start(run, running, lock)
                else:
                    note_running(step, training)
                progress.tell(run.name, describe(run, step.name, study))
    finally:
        stop([training for _, training in running])


def is_ready(
    run: Run, waiting: list[Run], running: list[tuple[Run, Training]]
) -> bool:
    """Whether the run that it needs, if any, is at its end."""
    at_work = [*waiting, *(other for other, _ in running)]
    return all(other is not run.needed for other in at_work)


def prepare(run: Run, keep_stale: bool) -> bool:
    """Clear the way for a run; False if nothing is to be run."""
    try:
        if run.needed is not None and run.needed.failure:
            run.failure = f'not run: {run.needed.name} failed'
            return False
        if is_done(status(run, keep_stale)):
            return False
        if run.lacking:
            raise ConfigError(f'not run: {run.lacking}')
        run.fetch()
        if run.changed():
            remove(run.folder)
        else:
            note_lost_time(run.next_step)
        run.write_config()
    except (CheckpointError, ConfigError, OSError) as error:
        run.failure = str(error)
    return not run.failure


def remove(folder: Path) -> None:
    """A folder whose removal is broken off is no run's any more."""
    aside = folder.with_name(f'{REMOVED}{folder.name}')
    folder.rename(aside)
    shutil.rmtree(aside)


def remove_leftovers(work_dir: Path) -> None:
    """Of removals that were broken off."""
    for folder in work_dir.glob(f'{REMOVED}*'):
        shutil.rmtree(folder, ignore_errors=True)


def start(run: Run, running: list[tuple[Run, Training]], lock: int) -> None:
    step = run.next_step
    if step.name == 'test':
        shutil.rmtree(run.folder / 'test', ignore_errors=True)
    step.folder.mkdir(parents=True, exist_ok=True)
    note_begun(step)
    running.append((run, Training.start(step, lock)))


def conclude(run: Run, training: Training, study: Study) -> None:
    """Note what has ended: a training, a test with its result, a failure."""
    step = training.network
    step.note(begun=None)
    code = training.process.returncode
    what = {'train': 'training', 'test': 'testing'}[step.log.stem]
    if code:
        run.failure = f'{what} failed (exit status {code}), see {step.log}'
    elif step.log.stem == 'train':
        if run.checkpoint is None:
            run.failure = f'training left no checkpoint, see {step.log}'
    else:
        write_result(run, study, step.log)


def write_result(run: Run, study: Study, log: Path) -> None:
    files = sorted((run.folder / 'test').glob('*/*.json'))
    metrics = read_json(files[-1]) if files else {}
    missing = [key for key in study.metrics.values() if key not in metrics]
    if missing:
        known = ', '.join(key for key in metrics if '/' in key)
        run.failure = (
            f'the test gave no {", ".join(missing)}, but '
            f'{known or "nothing, as with a detector that finds nothing"}; '
            f'see {log}'
        )
        return
    test = read_json(run.folder / 'test.json')
    result = {
        'run': run.network,
        'seed': run.seed,
        'metrics': metrics,
        **cost_of(run),
        'test_seconds': test['wall_seconds'],
        'checkpoint': run.checkpoint_hash,
        'inputs': run.noted['fingerprint'],
        'versions': versions() | libraries(),
        'finished': now(),
    }
    write_json(run.folder / 'result.json', result)


def describe(run: Run, step: str, study: Study) -> str:
    """What to tell of a run, at the step of this name, in one line."""
    if run.failure:
        return 'failed'
    if result := run.result:
        return '   '.join(
            f'{name} {100 * result["metrics"][key]:.1f}'
            for name, key in study.metrics.items()
        )
    if step == 'test':
        return 'is tested'
    epochs = run.config.train_cfg.get('max_epochs')
    text = ''
    with contextlib.suppress(FileNotFoundError):
        text = (run.folder / 'train.txt').read_text(errors='replace')
    return last_progress(text, epochs) if epochs else 'is trained'
