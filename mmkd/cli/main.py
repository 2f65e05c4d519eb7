"""One command for all that mmkd does: ``mmkd COMMAND``."""

import contextlib
import difflib
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from mmkd.errors import MMKDError, missing_packages
from mmkd.version import __version__

COMMANDS = {
    'train': ('mmkd.cli.train', 'train a detector, with distillation'),
    'test': ('mmkd.cli.test', 'evaluate a detector'),
    'distill': ('mmkd.start.command', 'write, examine and train a config'),
    'doctor': ('mmkd.doctor.command', 'examine a config before a long run'),
    'study': ('mmkd.study.command', 'run and compare many trainings'),
    'report': ('mmkd.report.page', 'write a page about trainings'),
    'benchmark': ('mmkd.benchmark.command', 'measure what a step costs'),
    'prepare': ('mmkd.data.prepare.command', 'download or convert data sets'),
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
  mmkd report work_dirs/plain work_dirs/lad

A config is a file, or one that an installed package holds: mmkd::lad_r50.py.
Paths begin in the current folder.

exit status:
  0    done
  1    an error that you can mend, told in a line, or something was found
  2    the command line is wrong
  130  interrupted by Ctrl-C
  143  terminated (of commands that end their trainings, too)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``mmkd COMMAND …``; return its exit status."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ['']
    try:
        if name in COMMANDS:
            return load(name).main(arguments) or 0
        return answer(name, arguments)
    except MMKDError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\ninterrupted.', file=sys.stderr)
        return 130


def load(name: str) -> ModuleType:
    """Import a command.

    Raises:
        PackageError: If a package that mmkd works on is missing.
    """
    try:
        # MMDetection prints when it is imported.
        with contextlib.redirect_stdout(sys.stderr):
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
