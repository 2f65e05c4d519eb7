"""Train and test a grid of networks and seeds; compare them in one table.

Examples:
    mmkd study studies/bccd_frcnn.yaml --jobs 2
    mmkd study studies/bccd_frcnn.yaml --dry-run

The file names the runs (a config, the run that is its teacher, options), the
seeds, the metrics and the run that the others are compared with. Each run is
``mmkd train`` with ``randomness.seed`` and ``mmkd test`` with its last
checkpoint, without any selection, in ``WORK_DIR/<run>-seed<k>``; a student
has the teacher of its seed. A run that is ``of`` another one only tests a
peer of it (``network``), or several of its networks as one (``ensemble``).
Ctrl-C stops a study, and the same command continues it. What is done is done
again only if its config, data, teacher, peers, the code of mmkd or the
installed packages have changed. The study writes table.md and table.json to
the work dir; the exit status is 1 if a run has failed.

A run with ``each`` (named options), ``teachers`` or ``data`` (named options
of the study, for all runs) is a grid: one row for each combination.

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
of each of its rows; ``of``, ``teacher`` and ``baseline`` also take the name
of one row. The ``data`` of a run name those that it is for, with further
options. Where options meet, those in ``each`` win over those of the run's
data, and these over those of the study's data and of the run.

What is under ``pretrain`` comes first. A run that is ``pretrained`` by it
begins, with each seed, with the backbone of the first of its configs.

    pretrain:
      simclr: {configs: [student.py], options: --images photos --epochs 200}
    runs:
      student: {config: student.py}
      begun: {config: student.py, pretrained: simclr}
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence

# One thread per process: more of them wait for each other on a busy machine.
os.environ.setdefault('OMP_NUM_THREADS', '1')

from mmkd.data.files import real_path
from mmkd.engine.preemption import DEFAULTS, SAME, SIGNALS

from .step import locked
from .study import read_study
from .table import write_table
from .work import execute, remove_leftovers, tell_plan

ENDED: list[float] = []
"""When signals have come that end this process."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='mmkd study',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('study', type=real_path, help='a YAML file')
    parser.add_argument(
        '--jobs', type=int, default=1, help='how many runs run at a time'
    )
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


def _end(number: int, _: object) -> None:
    """End the study, which ends its trainings and waits for them.

    What comes within a second is the same signal. A later one ends it at
    once.
    """
    now = time.monotonic()
    if ENDED and now - ENDED[-1] < SAME:
        return
    ENDED.append(now)
    sys.exit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    for number in SIGNALS:
        if number != signal.SIGINT and signal.getsignal(number) in DEFAULTS:
            signal.signal(number, _end)
    study = read_study(args.study)
    if args.dry_run:
        tell_plan(study, args.keep_stale)
        return 0
    try:
        with locked(study.work_dir) as lock:
            remove_leftovers(study.work_dir)
            tell_plan(study, args.keep_stale)
            try:
                execute(study, args.jobs, lock, keep_stale=args.keep_stale)
            finally:
                text = write_table(study)
    except KeyboardInterrupt:
        again = 'Run the same command again to continue.'
        print(f'\nInterrupted. {again}', file=sys.stderr)
        return 130
    print(f'\n{text}\n{os.path.relpath(study.work_dir / "table.md")}')
    return int(any(run.failure for run in study.runs))
