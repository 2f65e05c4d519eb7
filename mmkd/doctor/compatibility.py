"""Which of MMDetection's detectors can be distilled, and how.

Examples:
    python tools/compatibility.py
    python tools/compatibility.py --only '^(gfl|paa)/' --jobs 2
    python tools/compatibility.py --only '^gfl/' --again all
    python tools/compatibility.py --table  # from what is there, tries nothing

Of every family one or two stock configs are shrunk to toy scale and trained:
two plain iterations, then two with each kind of distillation from an
untrained detector of the same config, on photos of COCO. Each config has a
process of its own with limits of time and memory; what ends it is written
down. Verdicts are kept in the JSON file, so that a run that was ended goes on
where it was; those of other versions are tried again. The page always shows
all that is kept.
"""

import argparse
import json
import os
import platform
import re
import resource
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch
import torch._dynamo  # optimizers import it, in every process again
from mmdet.utils import register_all_modules

import mmkd
from mmkd.data.files import write_text

from .compatibility_page import page
from .families import PAIRS, Pair, families
from .jobs import Job, Send, in_processes
from .trial import FAILS, METHODS, examine

STEPS = ('plain', *METHODS)
ENDS = {
    'SIGXCPU': 'not done within the limit of CPU time',
    'SIGKILL': 'killed: it hung, or the machine was out of memory',
}
PATIENCE = 3600  # seconds until a process is one that hangs
PACKAGES = ('torch', 'mmengine', 'mmcv', 'mmdet')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--only', default='', help='pattern of configs, and names, to try'
    )
    parser.add_argument('--jobs', type=int, default=1, help='at a time')
    parser.add_argument(
        '--limit', type=int, default=240, help='CPU seconds a config may take'
    )
    parser.add_argument(
        '--memory', type=float, default=12, help='GiB a config may take'
    )
    parser.add_argument(
        '--data', type=Path, default=Path('data/coco'), help='COCO layout'
    )
    parser.add_argument(
        '--json',
        type=Path,
        default=Path('work_dirs/compatibility.json'),
        help='where verdicts are kept',
    )
    parser.add_argument(
        '--output', type=Path, default=Path('docs/compatibility.md')
    )
    parser.add_argument(
        '--again',
        nargs='?',
        const='failed',
        choices=('failed', 'all'),
        help='of those to try, also what has failed, or all that is kept',
    )
    parser.add_argument(
        '--table', action='store_true', help='write the page, try nothing'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with its jobs
    torch.set_num_threads(1)
    content: dict[str, Any] = {'versions': versions(), 'trials': {}}
    if args.json.is_file():
        kept = json.loads(args.json.read_text())
        if args.table or kept['versions'] == content['versions']:
            content = kept
    pairs = all_pairs(args.only)
    if not args.table:
        register_all_modules()
        valid = still_valid(content['trials'], args.again)
        for name, steps in trials(pairs, valid, args):
            content['trials'][name] = steps
            write(args.json, json.dumps(content, indent=1))
            print(line(name, steps), flush=True)
    write(args.output, page(all_pairs(''), content))
    print(f'Written: {args.output}')


def still_valid(kept: dict[str, Any], again: str | None) -> dict[str, Any]:
    """Those of the verdicts that need not be found again."""
    if again is None:
        return kept
    if again == 'all':
        return {}
    return {
        name: steps
        for name, steps in kept.items()
        if all(each['status'] != FAILS for each in steps.values())
    }


def versions() -> dict[str, str]:
    modules = {name: __import__(name).__version__ for name in PACKAGES}
    return {
        'mmkd': mmkd.__version__,
        **modules,
        'python': platform.python_version(),
        'device': 'cpu',
    }


def all_pairs(only: str) -> list[Pair]:
    """Pairs of two detectors, then each config with itself."""
    same = [
        Pair(f'{folder}/{name}', f'{folder}/{name}', f'{folder}/{name}')
        for folder, names in families().items()
        for name in names
    ]
    return [pair for pair in (*PAIRS, *same) if re.search(only, pair.name)]


def trials(
    pairs: list[Pair], kept: dict[str, Any], args: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the verdicts of each pair, as they end."""
    waiting = [pair for pair in pairs if pair.name not in kept]
    attempt = partial(work, args=args)
    for job in in_processes(
        waiting, attempt, jobs=args.jobs, patience=PATIENCE
    ):
        yield job.task.name, verdicts(job)


def work(pair: Pair, send: Send, args: argparse.Namespace) -> None:
    memory = int(args.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (args.limit, args.limit + 10))
    examine(
        pair.student,
        pair.teacher,
        pair.features,
        args.data.resolve(),
        lambda step, verdict: send((step, verdict)),
    )


def verdicts(job: Job) -> dict[str, Any]:
    """What a process that has ended said, and how it ended otherwise."""
    steps: dict[str, Any] = dict(job.messages)
    if how := job.ended_by:
        how = ENDS.get(how, f'its process ended with {how}')
        missing = next((s for s in STEPS if s not in steps), 'plain')
        steps[missing] = dict(status=FAILS, reason=how)
    return steps


def line(name: str, steps: dict[str, Any]) -> str:
    said = (f'{step}: {each["status"]}' for step, each in steps.items())
    return f'{name} | {", ".join(said)}'


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
