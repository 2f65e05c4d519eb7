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
import multiprocessing
import os
import platform
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch
import torch._dynamo  # optimizers import it, in every process again
from mmdet.utils import register_all_modules

import mmkd

from .compatibility_page import page
from .families import PAIRS, Pair, families
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


@dataclass
class Job:
    """A process that examines a pair."""

    pair: Pair
    process: Any
    receiver: Connection
    start: float = field(default_factory=time.monotonic)


def trials(
    pairs: list[Pair], kept: dict[str, Any], args: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the verdicts of each pair, as they end."""
    waiting = [pair for pair in pairs if pair.name not in kept]
    running: list[Job] = []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            running.append(start(waiting.pop(0), args))
        wait([job.process.sentinel for job in running], timeout=1)
        for job in list(running):
            if time.monotonic() - job.start > PATIENCE:
                job.process.kill()
            elif job.process.is_alive():
                continue
            job.process.join()
            running.remove(job)
            yield job.pair.name, verdicts(job)


def start(pair: Pair, args: argparse.Namespace) -> Job:
    # Forked: importing all again would take longer than most trials.
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=work, args=(pair, sender, args), daemon=True
    )
    process.start()
    sender.close()
    return Job(pair, process, receiver)


def work(pair: Pair, sender: Connection, args: argparse.Namespace) -> None:
    memory = int(args.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (args.limit, args.limit + 10))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    examine(
        pair.student,
        pair.teacher,
        pair.features,
        args.data.resolve(),
        lambda step, verdict: sender.send((step, verdict)),
    )


def verdicts(job: Job) -> dict[str, Any]:
    """What a process that has ended said, and how it ended otherwise."""
    steps: dict[str, Any] = {}
    try:
        while job.receiver.poll():
            step, verdict = job.receiver.recv()
            steps[step] = verdict
    except EOFError:
        pass
    code = job.process.exitcode
    if code:
        how = f'status {code}' if code > 0 else signal.Signals(-code).name
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
    part = path.with_suffix(path.suffix + '.part')
    part.write_text(text)
    part.replace(path)
