r"""Distil one detector into another: config, examination, training.

Writes a config that you can keep and edit, with every option of the methods
(as published for such a student, where it is, and fitted to both networks),
examines it (`mmkd doctor`), and trains (`mmkd train`) if nothing is wrong.
Config and run are in one folder, named after the student and the methods. A
run that was interrupted goes on with --resume.

With --unlabelled, methods that need no labels learn from further images, too.

With --method none it trains the student without a teacher: for a teacher of
your own, or to compare with.

Examples:
    mmkd distill --method pkd \
        --student mmdet::retinanet/retinanet_r50_fpn_1x_coco.py \
        --teacher retinanet_r101_fpn_2x_coco
    mmkd distill --student my_student.py --method pkd kd \
        --teacher my_teacher.py --teacher-checkpoint my_teacher.pth \
        --data my_folder --epochs 50
    mmkd distill --student my_student.py --method pseudolabels \
        --teacher my_teacher.py --teacher-checkpoint my_teacher.pth \
        --data my_folder --unlabelled more_images
    mmkd distill --method help --student STUDENT --teacher TEACHER
    mmkd distill --method none --student STUDENT --data my_folder
"""

import argparse
import contextlib
import importlib
import multiprocessing
import os
import os.path as osp
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from mmkd.data.files import path_hint, write_text, wrong_path
from mmkd.data.layouts import FOLDERS, Data, find_data
from mmkd.data.unlabelled.sources import find_images
from mmkd.detectors.source import load_config
from mmkd.doctor import command as doctor
from mmkd.engine.next_steps import next_steps
from mmkd.engine.preemption import DEFAULTS
from mmkd.engine.work_dir import check_no_training, one_training
from mmkd.errors import ConfigError, DataError, WorkDirError
from mmkd.utils import CfgOptions, add_cfg_options, whole_number

from .config_text import (
    Wishes,
    Written,
    check_images,
    config_of,
    find_method,
    is_as_written,
    methods,
    stock_name,
    teacher_options,
    tried_methods,
    write_config,
)
from .pair import Pair
from .run import Run, find_run, move_away

LAST_FILE = 4096
FILES = dict(
    student='config',
    teacher='config',
    teacher_checkpoint='checkpoint',
    load_from='checkpoint',
)
"""Options that name a file, and of what."""
HELP = 'help'
"""Instead of a method: lists those that fit."""
NONE = 'none'
"""Instead of a method: trains without distillation."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='mmkd distill',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--student',
        required=True,
        help='stock config: a path, mmdet::NAME, or a name in '
        "MMDetection's model index",
    )
    parser.add_argument(
        '--teacher',
        help="a name in MMDetection's model index, a config, an ONNX file, a "
        'file of detections (COCO JSON or CSV), a function '
        '(module:function), or the type of a registered teacher',
    )
    parser.add_argument(
        '--teacher-options',
        nargs='+',
        default={},
        action=CfgOptions,
        metavar='KEY=VALUE',
        help='options of the teacher, such as classes=coco',
    )
    parser.add_argument('--teacher-checkpoint', help='path or URL')
    parser.add_argument(
        '--teacher-prefix',
        metavar='PREFIX',
        help="what comes before the teacher's names in a checkpoint that "
        'holds several networks, such as student',
    )
    parser.add_argument(
        '--method',
        required=True,
        nargs='+',
        help=f'one or more of {", ".join(methods())}; {HELP} lists those '
        f'that fit both networks, {NONE} trains without a teacher',
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
    _add_unlabelled(parser)
    _add_training(parser)
    args = parser.parse_args(argv)
    if args.method == [NONE]:
        without = ('teacher', 'teacher_checkpoint', 'balance', 'unlabelled')
        for option in without:
            if getattr(args, option) is not None:
                parser.error(
                    f'--method {NONE} has no --{option.replace("_", "-")}'
                )
    elif args.teacher is None:
        parser.error(f'--teacher is missing (only --method {NONE} has none)')
    if args.unlabelled is None and (
        args.unlabelled_alone or args.unlabelled_weight is not None
    ):
        parser.error('--unlabelled is missing, which gives the images')
    return args


def _add_unlabelled(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--unlabelled',
        metavar='SOURCE',
        help='images without labels to learn from as well: a folder, a text '
        "file of paths, a video, or a file in COCO's format",
    )
    parser.add_argument(
        '--unlabelled-weight',
        type=float,
        metavar='W',
        help='factor of the losses on them (default: 1)',
    )
    parser.add_argument(
        '--unlabelled-alone',
        action='store_true',
        help='learn from them alone, so that the training needs no labels',
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--epochs',
        type=whole_number(1),
        metavar='N',
        help='length of the training; the schedule is stretched to it',
    )
    parser.add_argument(
        '--batch-size',
        type=whole_number(1),
        metavar='N',
        help='images on each GPU; the learning rate is scaled to it',
    )
    parser.add_argument(
        '--load-from',
        metavar='CHECKPOINT',
        help='weights that the student begins with',
    )
    parser.add_argument(
        '--work-dir',
        type=Path,
        help='folder of the config and the run (default: work_dirs/…)',
    )
    parser.add_argument(
        '--eval',
        type=whole_number(0),
        default=0,
        metavar='N',
        help='evaluate the teacher on N images first',
    )
    parser.add_argument(
        '--balance',
        type=float,
        metavar='SHARE',
        help='hold the method at this share of the gradient, such as .3, by '
        'its weight, where no published weight suits the pair',
    )
    parser.add_argument(
        '--no-train', action='store_true', help='write and examine only'
    )
    begun = parser.add_mutually_exclusive_group()
    begun.add_argument(
        '--resume', action='store_true', help='go on where the run stopped'
    )
    begun.add_argument(
        '--overwrite',
        action='store_true',
        help='begin again; what the run wrote moves to a folder in its own',
    )
    parser.add_argument(
        '--verbose', action='store_true', help='print the config as well'
    )
    add_cfg_options(parser)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    given = sys.argv[2:] if argv is None else argv
    environment = dict(os.environ)
    got: list[int] = []
    try:
        with _signals(got):
            ready = _distil(args)
    except (Exception, _Ended):
        if not got:
            raise
        name = signal.Signals(got[0]).name
        command = shlex.join(['mmkd', 'distill', *given])
        print(
            f'\n{name}: the training has not begun. To go on, give the same '
            f'command: {command}',
            file=sys.stderr,
        )
        return 128 + got[0]
    if isinstance(ready, int):
        return ready
    return _train(ready, environment)


def _distil(args: argparse.Namespace) -> int | list[str]:
    """Do all that comes before the training.

    Returns:
        The command that trains, or an exit status if there is nothing to
        train.
    """
    for module in args.imports:
        _import(module)
    _check_paths(args)
    student = stock_name(args.student)
    names = list(dict.fromkeys(args.method))
    if names == [NONE]:
        teacher, names = {}, []
    else:
        teacher = teacher_options(
            args.teacher,
            args.teacher_checkpoint,
            args.teacher_prefix,
            args.teacher_options,
        )
    if names == [HELP]:
        return _list_methods(student, teacher)
    for method in names:
        find_method(method)
    unlabelled = _unlabelled(args)
    check_images(names, unlabelled)
    stem = Path(student.rpartition('::')[2]).stem
    name = '_'.join([stem, *names])
    folder = args.work_dir or Path('work_dirs') / name
    config = folder / f'{name}.py'
    check_no_training(str(folder))
    run = find_run(folder)
    if run and not (args.resume or args.overwrite):
        _check_finished(run, config)
    data = find_data(args.data) if args.data else None
    if data is not None:
        _tell_data(data)
    loads = args.load_from
    if loads and '://' not in loads:
        loads = osp.abspath(osp.expanduser(loads))
    wishes = Wishes(
        epochs=args.epochs,
        batch_size=args.batch_size,
        load_from=loads,
        balance=args.balance,
        unlabelled=unlabelled,
        options=args.cfg_options or {},
    )
    written = write_config(student, teacher, names, data, args.imports, wishes)
    folder.mkdir(parents=True, exist_ok=True)
    with one_training(str(folder)):
        if args.overwrite and (moved := move_away(folder, config)):
            print(f'What was in {folder} is now in {moved}.')
            run = None
        text = _keep(config, written, begun=run is not None)
        _tell(written, config, text if args.verbose or args.no_train else '')
        if run is None or args.no_train:
            if args.resume:
                print('There is nothing to resume: the training begins.')
            look = ['--eval', str(args.eval)] if names else ['--data-only']
            status = doctor.main([str(config), *look])
            if status or args.no_train:
                return status
    if run is not None and run.is_finished(load_config(config).train_cfg):
        return _tell_finished(run, config)
    command = ['train', str(config), '--work-dir', str(folder)]
    return command + ['--resume'] * (run is not None)


def _unlabelled(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return ``distillation.unlabelled`` as the options give it."""
    if args.unlabelled is None:
        return None
    source = osp.abspath(osp.expanduser(args.unlabelled))
    find_images(source)  # which says what is wrong with it
    weight = args.unlabelled_weight
    return dict(
        dataset=source,
        weight=1.0 if weight is None else weight,
        alone=args.unlabelled_alone,
    )


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f'--import {module}: {error}. Give the name of a module that '
            'Python finds, from the current folder or PYTHONPATH.'
        ) from error


def _check_paths(args: argparse.Namespace) -> None:
    """Refuse what is not there before anything is read or built.

    Raises:
        ConfigError: If a config or a checkpoint is missing.
        DataError: If the data are.
    """
    data = args.data
    if data and data not in FOLDERS and not Path(data).expanduser().exists():
        raise DataError(
            f'--data {data} does not exist. {path_hint(data)}'
            'Give a folder or a file with your data, or coco or voc.'
        )
    for option, kind in FILES.items():
        path = getattr(args, option)
        if not path or '::' in path or '://' in path:
            continue
        named = kind == 'config' and not (
            osp.exists(path) or path.endswith('.py') or os.sep in path
        )
        if not named and not osp.isfile(path):
            raise ConfigError(
                f'--{option.replace("_", "-")} {path} {wrong_path(path)}. '
                f'{path_hint(path)}Give the path of a {kind}.'
            )
    if args.work_dir and args.work_dir.is_file():
        raise ConfigError(
            f'--work-dir {args.work_dir} is a file. Give the name of a folder.'
        )


# ------------------------------------------------------------------- the run


def _check_finished(run: Run, config: Path) -> None:
    """Refuse to begin a run again that has been begun and is not complete.

    Raises:
        WorkDirError: If it is not complete, or its config is not there.
    """
    if config.is_file() and run.is_finished(load_config(config).train_cfg):
        return
    raise WorkDirError(
        f'{run.folder} holds a run that has been begun ({run.in_words()}). '
        'Go on with --resume, begin again with --overwrite, or choose '
        'another --work-dir.'
    )


def _keep(config: Path, written: Written, *, begun: bool) -> str:
    """Write the config, or keep the one that is there.

    Returns:
        Its text.

    Raises:
        ConfigError: If it differs from what is written, and that matters.
    """
    text = config.read_text() if config.is_file() else None
    if text == written.text:
        return text
    if text is not None and (begun or not is_as_written(text)):
        what = 'its run has begun' if begun else 'it has been edited'
        go_on = ['mmkd', 'train', str(config), '--work-dir']
        go_on += [str(config.parent), *(['--resume'] if begun else [])]
        raise ConfigError(
            f'{config} exists and differs from what this command would '
            f'write, and {what}. To train it: {shlex.join(go_on)}. To write '
            'it anew: --overwrite. Or choose another --work-dir.'
        )
    write_text(config, written.text)
    return written.text


def _train(command: Sequence[str], environment: dict[str, str]) -> int:
    """Let this process become the one that trains.

    The doctor's memory is free then, and signals reach the training alone.
    """
    for worker in multiprocessing.active_children():
        worker.terminate()
        worker.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os.closerange(3, LAST_FILE)  # of a GPU's driver, say
    start = [sys.executable, '-m', 'mmkd', *command]
    os.execve(sys.executable, start, environment)


class _Ended(KeyboardInterrupt):
    """A signal has come before the training."""


@contextlib.contextmanager
def _signals(got: list[int]) -> Iterator[None]:
    """Let SIGINT and SIGTERM end what comes before the training.

    Args:
        got: Takes the numbers of the signals that come.
    """
    own = os.getpid()

    def end(number: int, _: FrameType | None) -> None:
        if os.getpid() == own:
            got.append(number)
            raise _Ended
        if number == signal.SIGTERM:  # a worker; this process ends it
            os._exit(128 + number)

    former: dict[int, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        # One that is ignored, as in the background, stays so.
        if signal.getsignal(number) in DEFAULTS:
            with contextlib.suppress(ValueError):  # in another thread
                former[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for each, handler in former.items():
            signal.signal(each, handler)


# ------------------------------------------------------------------ the words


def _tell_data(data: Data) -> None:
    if data.groups:
        print(
            f'{", ".join(data.groups)}: a category without objects that '
            'groups the others. It is left out of the classes: '
            f'{", ".join(data.classes)}.'
        )
    for line in data.summary:
        print(line)
    for fault, places in data.faults.items():
        print(f'left out, {fault}: {len(places)}, such as {places[0]}')


def _tell(written: Written, config: Path, text: str) -> None:
    print('\nChosen for this pair:' if written.chosen else '')
    for line in written.chosen:
        print(f'  {line}')
    print(f'Config: {config}' + (f'\n\n{text}' if text else ''))
    print(flush=True)


def _tell_finished(run: Run, config: Path) -> int:
    print(f'The run in {run.folder} is complete ({run.in_words()}).')
    print('\n'.join(next_steps(str(config), str(run.folder))))
    print('To train it again: --overwrite, or another --work-dir.')
    return 0


def _list_methods(student: str, teacher: dict[str, Any]) -> int:
    """Print which methods fit a pair, and why the others do not."""
    network = config_of(teacher)
    if network is None:
        raise ConfigError(
            f'--method {HELP} is for teachers that are detectors; '
            f'{teacher["type"]} says itself what it gives.'
        )
    reasons = tried_methods(Pair(load_config(student), network))
    kinds = methods()
    width = max(map(len, reasons)) + 2
    for name in sorted(reasons, key=lambda n: (bool(reasons[n]), n)):
        about = (kinds[name].__doc__ or name).strip().splitlines()[0]
        print(f'{name:{width}}{reasons[name] or about}')
    return 0
