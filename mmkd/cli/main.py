"""One command for all that mmkd does: ``mmkd COMMAND``."""

import importlib
import sys
from collections.abc import Sequence

from mmkd.errors import MMKDError

COMMANDS = {
    'train': ('mmkd.cli.train', 'train a detector, with distillation'),
    'test': ('mmkd.cli.test', 'evaluate a detector'),
    'distill': ('mmkd.start.command', 'write, examine and train a config'),
    'doctor': ('mmkd.doctor.command', 'examine a config before a long run'),
    'study': ('mmkd.study.command', 'run and compare many trainings'),
    'report': ('mmkd.report.page', 'write a page about trainings'),
    'benchmark': ('mmkd.benchmark.command', 'measure what a step costs'),
    'prepare': ('mmkd.data.prepare.command', 'get or convert data'),
    'eval': ('mmkd.report.eval_coco', 'evaluate and compare COCO results'),
}
"""Name to the module with its ``main(argv)``, and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``mmkd COMMAND …``; return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        print('usage: mmkd {' + ','.join(COMMANDS) + '} ...', file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[arguments[0]][0])
    try:
        return module.main(arguments[1:]) or 0
    except MMKDError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
