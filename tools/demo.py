"""Distil a small detector on real photos, from the beginning to a verdict.

    python tools/demo.py
    python tools/demo.py --work-dir work_dirs/seed1 --seed 1 --jobs 1

The demo trains three networks that find tree crowns in aerial photos: a
teacher that starts from ImageNet, a small student, and the same student
distilled from the teacher. They have the same data and the same seed, and the
two students the same start and schedule. Then the demo evaluates the last
checkpoint of each and writes before_after.png, table.md, table.json, loss.png,
ap.png and pictures/ to the work dir. Ctrl-C stops it; the same command
continues, and repeats what is finished only if a config has changed.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

# This has to come before torch is imported. One thread per process gives the
# same numbers everywhere, and more threads wait for each other on a busy
# machine.
os.environ['OMP_NUM_THREADS'] = '1'

with redirect_stdout(sys.stderr):  # MMDetection prints when it is imported
    from mmkd.errors import MMKDError
    from mmkd.study.inputs import versions
    from mmkd.study.step import locked, now, read_json, write_json
    from mmkd.study.study import Study, study_of
    from mmkd.study.work import execute, tell_plan
    from mmkd.utils import add_cfg_options

ROOT = Path(__file__).resolve().parents[1]
NEEDS = ('neon', 'mobilenet_v2')
"""What `mmkd prepare` makes below data/, of packages of the index."""
NETWORKS = {'teacher': {}, 'student': {}, 'distilled': {'teacher': 'teacher'}}
"""The networks, and the one that teaches."""
RESULTS = (
    *('before_after.png', 'table.md', 'table.json', 'loss.png', 'ap.png'),
    'pictures',
)
NEXT = """\
For a pair of your own, with your photos in PATH:

    source .venv/bin/activate
    mmkd distill --student STUDENT.py --data PATH --method fgd \\
        --teacher TEACHER.py --teacher-checkpoint TEACHER.pth

STUDENT.py and TEACHER.py are stock configs (a file, or mmdet::NAME), and
TEACHER.pth is the teacher, trained on your classes (mmkd train TEACHER.py).
The configs of this demo are in configs/neon/."""


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))
    os.chdir(ROOT)
    try:
        prepare_data()
        with locked(args.work_dir) as lock:
            study = demo_study(args)
            tell_plan(study, keep_stale=True)
            execute(
                study, args.jobs, lock, keep_stale=True, stop_at_failure=True
            )
            check(study)
            report(study)
    except MMKDError as error:
        print(f'\nerror: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = 'Run the same command again to continue.'
        print(f'\nInterrupted. {again}', file=sys.stderr)
        return 130
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--work-dir',
        type=lambda path: Path(path).resolve(),
        default=ROOT / 'work_dirs' / 'demo',
        help='folder of logs, checkpoints and results',
    )
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--jobs',
        type=int,
        default=min(2, os.cpu_count() or 1),
        help='how many trainings run at a time, each on one core '
        '(default: %(default)s)',
    )
    add_cfg_options(parser)
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error('--jobs takes a number from 1')
    return args


def prepare_data() -> None:
    """Prepare the photos and the weights that are not there yet.

    Raises:
        MMKDError: If that fails.
    """
    for name in NEEDS:
        if (ROOT / 'data' / name).exists():
            continue
        print(f'Preparing data/{name}', flush=True)
        command = [sys.executable, '-m', 'mmkd', 'prepare', name]
        if subprocess.run(command, check=False).returncode:
            raise MMKDError(f'data/{name} could not be prepared (see above).')


def demo_study(args: argparse.Namespace) -> Study:
    """The study of the three networks, with one seed."""
    runs = {
        name: {
            'config': f'mmkd::neon/{name}.py',
            'options': args.cfg_options or {},
            **needs,
        }
        for name, needs in NETWORKS.items()
    }
    content = {
        'work_dir': str(args.work_dir),
        'seeds': [args.seed],
        'runs': runs,
    }
    return study_of(content, 'the demo', 'demo')


def check(study: Study) -> None:
    """Raise :class:`MMKDError` with the end of the log of what has failed."""
    for run in study.runs:
        if run.failure:
            lines = [f'{run.network}: {run.failure}']
            if run.step:
                log = run.step.log.read_text(errors='replace').splitlines()
                lines += [f'  | {line[:200]}' for line in log[-15:]]
            raise MMKDError('\n'.join(lines))


def report(study: Study) -> None:
    """Evaluate, draw and write, or reuse old results; print the table."""
    folder = study.work_dir
    marks = {run.network: run.checkpoint_hash for run in study.runs}
    results = read_json(folder / 'table.json')
    complete = 'verdict' in results
    complete &= all((folder / name).exists() for name in RESULTS)
    if complete and results.get('checkpoints') == marks:
        print(f'results: reused, as of {results["evaluated"]}')
    else:
        print('results: evaluating and drawing', flush=True)
        log = (folder / 'evaluation.txt').open('w')
        with log, redirect_stdout(log), redirect_stderr(log):
            # It draws, and this import takes a while.
            from mmkd.report.summary import write_results

            folders = {run.network: run.folder for run in study.runs}
            notes = {run.network: run.noted for run in study.runs}
            minutes = {k: n['cpu_seconds'] / 60 for k, n in notes.items()}
            results = write_results(folders, minutes, folder)
        for run in study.runs:
            command = ' '.join(['python', *run.training.command])
            row = results['networks'][run.network]
            row |= {'command': command, **notes[run.network]}
        results |= dict(
            evaluated=now(), versions=versions(), checkpoints=marks
        )
        write_json(folder / 'table.json', results)
    print(f'\n{(folder / "table.md").read_text()}')
    for name in RESULTS:
        print(os.path.relpath(folder / name))
    picture = os.path.relpath(folder / RESULTS[0])
    print(f'\nBefore and after, in one picture: {picture}')
    print(f'\n{results["verdict"]}\n\n{NEXT}')


if __name__ == '__main__':
    sys.exit(main())
