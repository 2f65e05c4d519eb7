"""What the benchmarks' numbers were measured on."""

import argparse
import contextlib
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmcv
import mmdet
import mmengine
import torch

import mmkd
from mmkd.report.summary import processor
from mmkd.teachers.cache import tensorfloat32

ROOT = Path(mmkd.__file__).resolve().parents[1]
"""The clone of mmkd, if it runs from one."""
PACKAGES = {
    **{'torch': 'PyTorch', 'mmcv': 'MMCV', 'mmdet': 'MMDetection'},
    **{'mmengine': 'MMEngine', 'mmkd': 'mmkd', 'cuda': 'CUDA'},
}


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments, the machine, the versions and the commit."""
    gpu = torch.cuda.get_device_name() if args.device == 'cuda' else None
    given = {k: plain(v) for k, v in vars(args).items() if v is not None}
    return {
        **given,
        'device': gpu or processor(),
        'processor': processor(),
        'cores': os.cpu_count(),
        'threads': torch.get_num_threads(),
        'dtype': str(torch.get_default_dtype()).removeprefix('torch.'),
        'tensorfloat32': dict(
            zip(('matmul', 'convolution'), tensorfloat32(), strict=True)
        ),
        'python': platform.python_version(),
        'torch': torch.__version__,
        'cuda': torch.version.cuda,
        'mmcv': mmcv.__version__,
        'mmengine': mmengine.__version__,
        'mmdet': mmdet.__version__,
        'mmkd': mmkd.__version__,
        'commit': git('rev-parse', '--short', 'HEAD'),
        'uncommitted': bool(git('status', '--porcelain')),
    }


def plain(value: Any) -> Any:
    """Turn what JSON cannot write into text."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, int | float | None):
        return value
    return str(value)


def git(*command: str) -> str | None:
    """Ask git about mmkd's clone; None without git or without a clone."""
    if not (ROOT / '.git').exists():
        return None
    with contextlib.suppress(OSError):
        done = subprocess.run(
            ['git', '-C', ROOT, *command], capture_output=True, text=True
        )
        return done.stdout.strip() or None
    return None


def measured_on(found: Mapping[str, Any]) -> str:
    """Describe an environment in the line that belongs below each table."""
    parts = [
        found['processor'],
        counted(found['cores'], 'core'),
        counted(found['threads'], 'thread'),
    ]
    if found['device'] != found['processor']:
        parts.insert(0, found['device'])
    parts.append(found['dtype'])
    versions = ', '.join(
        f'{name} {found[key]}' for key, name in PACKAGES.items() if found[key]
    )
    commit = found['commit'] or 'unknown'
    changed = ' with uncommitted changes' if found['uncommitted'] else ''
    return (
        f'Measured on {", ".join(parts)}; {versions}; commit {commit}'
        f'{changed}.'
    )


def counted(number: int, noun: str) -> str:
    return f'{number} {noun}{"" if number == 1 else "s"}'
