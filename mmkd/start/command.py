r"""Distil one detector into another: config, examination, training.

Writes a config that you can keep and edit, with every option of the method
(as published for such a student, where it is), examines it (`mmkd doctor`),
and trains (`mmkd train`) if nothing is wrong.

Examples:
    mmkd distill --method pkd \
        --student mmdet::retinanet/retinanet_r50_fpn_1x_coco.py \
        --teacher retinanet_r101_fpn_2x_coco
    mmkd distill --student my_student.py --method cwd \
        --teacher my_teacher.py --teacher-checkpoint my_teacher.pth \
        --data my_folder --no-train
"""

import argparse
import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mmkd.errors import ConfigError

from .config_text import config_text, methods, teacher_options
from .folders import find_data


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='mmkd distill',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--student', required=True, help='stock config: a path or mmdet::NAME'
    )
    parser.add_argument(
        '--teacher',
        required=True,
        help="a name in MMDetection's model index, a config, or the type of "
        'a registered teacher',
    )
    parser.add_argument('--teacher-checkpoint', help='path or URL')
    parser.add_argument(
        '--method', required=True, help=f'one of {", ".join(methods())}'
    )
    parser.add_argument(
        '--import',
        nargs='+',
        default=[],
        dest='imports',
        metavar='MODULE',
        help='modules that register methods or teachers of your own',
    )
    parser.add_argument(
        '--data',
        help='coco, voc, or a folder in one of these layouts (by default '
        "the student's own)",
    )
    parser.add_argument(
        '--work-dir',
        type=Path,
        help='folder of the config and the run (default: work_dirs/…)',
    )
    parser.add_argument(
        '--eval',
        type=int,
        default=0,
        metavar='N',
        help='evaluate the teacher on N images first',
    )
    parser.add_argument(
        '--no-train', action='store_true', help='write and examine only'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='override entries of the config, such as train_cfg.max_epochs=2',
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    for module in args.imports:
        _import(module)
    teacher = teacher_options(args.teacher, args.teacher_checkpoint)
    data = find_data(args.data) if args.data else None
    text = config_text(args.student, teacher, args.method, data, args.imports)
    name = f'{Path(args.student.rpartition("::")[2]).stem}_{args.method}'
    folder = args.work_dir or Path('work_dirs') / name
    folder.mkdir(parents=True, exist_ok=True)
    # Not the name under which the runner leaves its own dump of it.
    config = folder / f'distill_{args.method}.py'
    if config.exists() and config.read_text() != text:
        raise ConfigError(
            f'{config} exists and differs: train it with `mmkd train`, or '
            'move it away, or choose another --work-dir.'
        )
    config.write_text(text)
    print(f'{config}:\n\n{text}', flush=True)
    options = ['--cfg-options', *args.cfg_options] if args.cfg_options else []
    status = _run('doctor', config, '--eval', args.eval, *options)
    if status or args.no_train:
        return status
    return _run('train', config, '--work-dir', folder / 'run', *options)


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f'--import {module}: {error}. Give the name of a module that '
            'Python finds, from the current folder or PYTHONPATH.'
        ) from error


def _run(*command: object) -> int:
    start = [sys.executable, '-m', 'mmkd', *map(str, command)]
    return subprocess.run(start).returncode
