"""One command for all that mmkd does: ``mmkd COMMAND``."""

import contextlib
import difflib
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from mmkd.data.pictures import limit_decoder
from mmkd.errors import MMKDError, hushed, missing_packages
from mmkd.version import __version__

COMMANDS = {
    'train': ('mmkd.cli.train', 'train a detector, with distillation'),
    'test': ('mmkd.cli.test', 'evaluate a detector'),
    'distill': ('mmkd.start.command', 'write, examine and train a config'),
    'label': ('mmkd.label.command', 'write down what a detector finds'),
    'pretrain': (
        'mmkd.pretrain.command',
        'let backbones learn from images without labels',
    ),
    'doctor': ('mmkd.doctor.command', 'examine a config before a long run'),
    'study': ('mmkd.study.command', 'run and compare many trainings'),
    'export': ('mmkd.export.command', 'write a detector as an ONNX file'),
    'report': ('mmkd.report.page', 'write a page about trainings'),
    'benchmark': ('mmkd.benchmark.command', 'measure what a step costs'),
    'prepare': ('mmkd.data.prepare.command', 'download or convert data sets'),
    'convert': ('mmkd.cli.convert', 'map weights of other libraries'),
    'eval': ('mmkd.report.eval_coco', 'evaluate and compare COCO results'),
}
"""Name to the module with its ``main(argv)``, and what it does."""
SHELLS = ('bash', 'zsh', 'tcsh')
HELP = """\
usage: mmkd COMMAND [OPTION ...]
       mmkd COMMAND --help
       mmkd --help | --version | --print-completion {{{shells}}}

Knowledge distillation of object detectors, on MMDetection 3 and MMEngine.

commands:
{commands}

examples:
  mmkd distill --method pkd --teacher retinanet_r101_fpn_2x_coco \\
      --student mmdet::retinanet/retinanet_r50_fpn_1x_coco.py
  mmkd doctor mmkd::lad_r50.py
  mmkd train mmkd::lad_r50.py --work-dir work_dirs/lad
  mmkd test work_dirs/lad/lad_r50.py work_dirs/lad/epoch_12.pth
  mmkd export work_dirs/lad/lad_r50.py work_dirs/lad/epoch_12.pth --onnx
  mmkd report work_dirs/plain work_dirs/lad

A config is a file, or one that an installed package holds: mmkd::lad_r50.py.
Paths begin in the current folder.

exit status:
  0    done
  1    an error that you can mend, told in a line, or something was found
  2    the command line is wrong
  130  interrupted by Ctrl-C; trainings have saved a checkpoint
  141  what reads the output has ended, as in `mmkd … | head`
  143  terminated, likewise; in general, 128 and the number of the signal
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``mmkd COMMAND …``; return its exit status."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ['']
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names in files may be what no terminal can show.
            stream.reconfigure(errors='backslashreplace')
    try:
        limit_decoder()
        status = run(name, arguments)
        sys.stdout.flush()  # which fails on a full disk
        return status
    except MMKDError as error:
        tell(error)
        return 1
    except BrokenPipeError:  # as of `mmkd … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno is None:  # not the system's: PyTorch's, say
            raise
        print(f'error: {of_system(error)}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\ninterrupted.', file=sys.stderr)
        return 130


def tell(error: MMKDError) -> None:
    """Print an error; of one that all processes of a run have, the first."""
    if error.together:
        from mmengine.dist import barrier, is_main_process

        if is_main_process():
            print(f'error: {error}', file=sys.stderr, flush=True)
        # Where one process has ended, launchers end the others at once.
        with contextlib.suppress(RuntimeError):
            barrier()
    else:
        print(f'error: {error}', file=sys.stderr)


def run(name: str, arguments: Sequence[str]) -> int:
    if name in COMMANDS:
        return load(name).main(arguments) or 0
    return answer(name, arguments)


REMEDIES = {
    errno.ENOSPC: 'Make room on the disk.',
    errno.EDQUOT: 'Make room: your quota is used up.',
    errno.EFBIG: 'Make room, or raise the limit (ulimit -f).',
    errno.EROFS: 'Give a folder on a disk that can be written to.',
    errno.EACCES: 'Give yourself the rights to it, or take another path.',
    errno.EPERM: 'Give yourself the rights to it, or take another path.',
    errno.ENOTDIR: 'A part of this path is a file; take another path.',
    errno.EEXIST: 'A file has the name of the folder; take another path.',
    errno.EISDIR: 'Give a file in it, or take another path.',
    errno.ENOENT: 'Check the path, and where a link on it leads.',
    errno.ENAMETOOLONG: 'Take a shorter path.',
    errno.ELOOP: 'A link on it leads to itself, or is not followed.',
    errno.EMFILE: 'Raise the limit of open files (ulimit -n).',
}


def of_system(error: OSError) -> str:
    """Say what the system has refused, and what helps."""
    where = ' → '.join(str(f) for f in (error.filename, error.filename2) if f)
    remedy = REMEDIES.get(error.errno or 0, '')
    text = f'{where}: {error.strerror}.' if where else f'{error.strerror}.'
    return f'{text} {remedy}'.strip()


def load(name: str) -> ModuleType:
    """Import a command.

    Raises:
        PackageError: If a package that mmkd works on is missing.
    """
    try:
        with hushed():  # MMDetection and others print when imported
            return importlib.import_module(COMMANDS[name][0])
    except ModuleNotFoundError as error:
        if missing := missing_packages():
            raise missing from error
        raise


def answer(name: str, arguments: Sequence[str]) -> int:
    """Say what no command has to be run for."""
    shell = arguments[0] if arguments else ''
    if name in ('-h', '--help'):
        print(usage(), end='')
    elif name == '--version':
        print(f'mmkd {__version__}')
    elif name == '--print-completion' and shell in SHELLS:
        from .completion import completion

        found = {n: (load(n), text) for n, (_, text) in COMMANDS.items()}
        print(completion(shell, found))
    else:
        print(unknown(name) if name else usage(), file=sys.stderr)
        return 2
    return 0


def usage() -> str:
    lines = [f'  {name:10}{text}' for name, (_, text) in COMMANDS.items()]
    return HELP.format(commands='\n'.join(lines), shells=','.join(SHELLS))


def unknown(name: str) -> str:
    if name == '--print-completion':
        return f'error: {name} takes one of {", ".join(SHELLS)}.'
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f'Did you mean "{close[0]}"? ' if close else ''
    return (
        f'error: mmkd has no command "{name}". {hint}Known: '
        f'{", ".join(COMMANDS)}. See mmkd --help.'
    )
