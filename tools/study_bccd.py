"""Teacher, student and distilled student on BCCD, over several seeds.

Examples:
    python tools/prepare_data.py bccd
    python tools/study_bccd.py --seeds 0 1 2 --jobs 2

Each run is ``tools/train.py`` with ``randomness.seed`` and ``tools/test.py``
on the test split with its last checkpoint, nothing selected. What is done is
not repeated; an interrupted run is resumed. The distilled student of a seed
has the teacher of that seed.
"""

import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = ('teacher', 'student', 'distilled')
EPOCHS = {'teacher': 18, 'student': 12, 'distilled': 12}
METRICS = {
    'AP': 'coco/bbox_mAP',
    'AP50': 'coco/bbox_mAP_50',
    'AP75': 'coco/bbox_mAP_75',
    'VOC mAP': 'pascal_voc/mAP',
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time')
    parser.add_argument(
        '--work-dir', type=Path, default=Path('work_dirs/bccd')
    )
    return parser.parse_args()


def call(arguments: list[str], log: Path) -> None:
    """Run a tool with one thread; its output goes to ``log``."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    with log.open('a') as file:
        subprocess.run(
            [sys.executable, *arguments],
            check=True,
            cwd=ROOT,
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def run(network: str, seed: int, work_dir: Path) -> dict[str, float]:
    """Train and test one network unless that was done; its metrics."""
    folder = (work_dir / f'{network}-seed{seed}').resolve()
    result = folder / 'test' / 'metrics.json'
    if not result.exists():
        folder.mkdir(parents=True, exist_ok=True)
        config = f'configs/bccd/{network}.py'
        options = [f'randomness.seed={seed}']
        if network == 'distilled':
            teacher = folder.with_name(f'teacher-seed{seed}')
            checkpoint = teacher / f'epoch_{EPOCHS["teacher"]}.pth'
            options.append(f'distillation.teacher.checkpoint={checkpoint}')
        last = folder / f'epoch_{EPOCHS[network]}.pth'
        if not last.exists():
            call(
                [
                    *('tools/train.py', config, '--work-dir', str(folder)),
                    *('--resume', '--cfg-options', *options),
                ],
                folder / 'train.txt',
            )
        call(
            [
                *('tools/test.py', config, str(last)),
                *('--work-dir', str(folder / 'test')),
            ],
            folder / 'test.txt',
        )
        written = max((folder / 'test').glob('*/*.json'))
        os.replace(written, result)
    metrics = json.loads(result.read_text())
    print(
        f'{network} seed {seed}: '
        + '  '.join(f'{k} {100 * metrics[v]:.1f}' for k, v in METRICS.items()),
        flush=True,
    )
    return metrics


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Mean ± standard deviation (n - 1) over the seeds, in Markdown."""
    rows = [f'| | {" | ".join(METRICS)} |', '|---|' + '---|' * len(METRICS)]
    for network, runs in results.items():
        cells = [spread([m[key] for m in runs]) for key in METRICS.values()]
        rows.append(f'| {network} | {" | ".join(cells)} |')
    gains = [
        spread(
            [
                d[key] - s[key]
                for s, d in zip(
                    results['student'], results['distilled'], strict=True
                )
            ],
            sign='+',
        )
        for key in METRICS.values()
    ]
    rows.append(f'| distilled - student, paired | {" | ".join(gains)} |')
    return '\n'.join(rows)


def spread(values: list[float], sign: str = '') -> str:
    """Percent, mean ± standard deviation."""
    mean = 100 * statistics.mean(values)
    deviation = 100 * statistics.stdev(values) if len(values) > 1 else 0.0
    return f'{mean:{sign}.1f} ± {deviation:.1f}'


def main() -> None:
    args = parse_args()
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = {
            (network, seed): pool.submit(run, network, seed, args.work_dir)
            for network in ('teacher', 'student')
            for seed in args.seeds
        }
        for seed in args.seeds:
            runs['teacher', seed].result()
            runs['distilled', seed] = pool.submit(
                run, 'distilled', seed, args.work_dir
            )
    results = {
        network: [runs[network, seed].result() for seed in args.seeds]
        for network in NETWORKS
    }
    text = table(results)
    print(f'\nBCCD test split, seeds {args.seeds}\n\n{text}')
    args.work_dir.mkdir(parents=True, exist_ok=True)
    (args.work_dir / 'table.md').write_text(text + '\n')


if __name__ == '__main__':
    main()
