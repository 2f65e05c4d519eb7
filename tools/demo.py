"""Distil a small detector on real photos, from the beginning to a table.

    python tools/demo.py
    python tools/demo.py --work-dir work_dirs/seed1 --seed 1 --jobs 1

The demo trains three networks that find tree crowns in aerial photos: a
teacher, a student a quarter as wide, and the same student distilled from the
teacher. All start from scratch, with the same data, schedule and seed. Then
the demo evaluates the last checkpoint of each and writes table.md,
table.json, loss.png, ap.png and pictures/ to the work dir. Ctrl-C stops it;
the same command continues, and repeats what is finished only if a config has
changed.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

# This has to come before torch is imported. One thread per process gives the
# same numbers everywhere, and more threads wait for each other on a busy
# machine.
os.environ['OMP_NUM_THREADS'] = '1'

from mmkd.errors import MMKDError
from mmkd.study.training import (
    DemoError,
    Network,
    locked,
    now,
    plan,
    read_json,
    train,
    versions,
    write_json,
)

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / 'data' / 'neon'
RESULTS = ('table.md', 'table.json', 'loss.png', 'ap.png', 'pictures')


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))
    os.chdir(ROOT)
    try:
        prepare_data()
        with locked(args.work_dir) as lock:
            options = [f'randomness.seed={args.seed}', *args.cfg_options]
            networks = plan(args.work_dir, DATA, options)
            train(networks, args.jobs, lock)
            report(networks, args.work_dir)
    except (DemoError, MMKDError) as error:
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
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='override entries of all three configs',
    )
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error('--jobs takes a number from 1')
    return args


def prepare_data() -> None:
    """Prepare the data set if it does not exist.

    Raises:
        DemoError: If that fails.
    """
    if DATA.exists():
        return
    print('Preparing the data', flush=True)
    command = [sys.executable, '-m', 'mmkd', 'prepare', 'neon']
    if subprocess.run(command, check=False).returncode:
        raise DemoError('the data could not be prepared (see above).')


def report(networks: Mapping[str, Network], folder: Path) -> None:
    """Evaluate, draw and write, or reuse old results; print the table."""
    marks = {n.name: n.fingerprint for n in networks.values()}
    old = read_json(folder / 'table.json')
    complete = all((folder / name).exists() for name in RESULTS)
    if complete and old.get('fingerprints') == marks:
        print(f'results: reused, as of {old["evaluated"]}')
    else:
        print('results: evaluating and drawing', flush=True)
        log = (folder / 'evaluation.txt').open('w')
        with log, redirect_stdout(log), redirect_stderr(log):
            # MMDetection comes with this import, and warns of this and that.
            from mmkd.report.summary import write_results

            folders = {n.name: n.folder for n in networks.values()}
            states = {n.name: n.state for n in networks.values()}
            minutes = {k: s['cpu_seconds'] / 60 for k, s in states.items()}
            data = write_results(folders, minutes, folder)
        for name, network in networks.items():
            command = ' '.join(['python', *network.command])
            data['networks'][name] |= {'command': command, **states[name]}
        data |= dict(evaluated=now(), versions=versions(), fingerprints=marks)
        write_json(folder / 'table.json', data)
    print(f'\n{(folder / "table.md").read_text()}')
    for name in RESULTS:
        print(os.path.relpath(folder / name))


if __name__ == '__main__':
    sys.exit(main())
