"""Measure whether two processes equal one, and write docs/processes.md.

Two real processes train each method on six kinds of batches, and their
gradients are compared with those of one process with the whole batch. This
takes a few minutes.

Examples:
    python tools/process_table.py
    python tools/process_table.py --only '^KD'  # measure some, write nothing
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tests' helpers are in no package

from tests.helpers.processes import (  # noqa: E402
    CASES,
    TOLERANCE,
    Case,
    Differences,
    measured,
    wrong,
)
from tools.method_table import markdown  # noqa: E402

PAGE = 'docs/processes.md'
BEGIN = '<!-- written by tools/process_table.py -->'
END = '<!-- end of the processes -->'
HEADER = (
    'method',
    'options',
    'detectors',
    'two processes equal one',
    'largest difference',
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--only', default='', help='pattern of the cases to measure'
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), args.only)
    for name, differences in found.items():
        print(name, *(f'{k}: {v:.0e}' for k, v in differences.items()))
    if unexpected := wrong(found):
        print('NOT AS STATED:', *unexpected, sep='\n', file=sys.stderr)
        return 1
    if not args.only:
        path = ROOT / PAGE
        head, _, rest = path.read_text().partition(BEGIN)
        tail = rest.partition(END)[2]
        path.write_text(f'{head}{BEGIN}\n\n{table(found)}\n\n{END}{tail}')
    return 0


def table(found: Mapping[str, Differences]) -> str:
    rows = [HEADER]
    for case in CASES:
        difference, kind = max(
            (difference, kind)
            for name in case.names
            for kind, difference in found[name].items()
        )
        shown = f'{difference:.0e}'
        if difference > TOLERANCE:
            shown = f'{difference:.1g} ({kind})'
        rows.append((*described(case), shown))
    return markdown(rows)


def described(case: Case) -> tuple[str, str, str, str]:
    """The cells of a case that are not measured."""
    options = [f'`{name}={value!r}`' for name, value in case.options.items()]
    options += [case.note] if case.note else []
    return (
        f'`{case.method}`' if case.method else 'plain training',
        ', '.join(options) or 'the defaults',
        ', '.join(case.detectors),
        f'equal but for {case.apart}' if case.apart else 'equal',
    )


if __name__ == '__main__':
    sys.exit(main())
