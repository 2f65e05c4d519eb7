"""Examine a config that distils, before the long run.

Reads the data, builds the networks as training does, takes a few steps and
says what is in the data, what was loaded, what meets what, which way each loss
pulls, how strongly, and what it costs. What was found comes first. The exit
status is 1 if training would fail or teach nothing; with warnings and notes
alone it is 0.

With --data-only it examines the data alone, of any config or of a folder.

With --self-test it examines mmkd instead of a config: stock configs of the
installed MMDetection are drawn by a seed and trained for a few steps on drawn
photos, once stock and once with a distillation at weight 0. The exit status
is 1 if any of them differs in a bit.

Examples:
    mmkd doctor mmkd::faster_rcnn_kd_r50.py --eval 100
    mmkd doctor CONFIG --cfg-options train_dataloader.batch_size=2
    mmkd doctor --data-only my_folder --data-sample all
    mmkd doctor --self-test --configs 40 --seed 7 --jobs 2
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import get_terminal_size

from mmkd.data.layouts import FOLDERS, find_data
from mmkd.detectors.source import load_config, read_config
from mmkd.errors import hushed
from mmkd.utils import add_cfg_options, whole_number

from . import Report, diagnose
from .data import check_data, data_config, say_found
from .photos import BUDGET, DECODED


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='mmkd doctor',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'config',
        nargs='?',
        help='config with `distillation`; with --data-only, any config with '
        'data sets, or a folder of data',
    )
    parser.add_argument(
        '--eval',
        type=whole_number(0),
        default=0,
        metavar='N',
        help="the teacher's metrics on N validation images (0: skip)",
    )
    parser.add_argument('--json', type=Path, help='write the result there too')
    parser.add_argument(
        '--verbose', action='store_true', help='every tap, level by level'
    )
    add_cfg_options(parser)
    data = parser.add_argument_group('data')
    data.add_argument(
        '--data-only',
        action='store_true',
        help='examine the data and build no network',
    )
    data.add_argument(
        '--data-sample',
        type=sample_size,
        metavar='N',
        help='decode N images, or `all`, to find damage and copies (default: '
        f'up to {DECODED:,}, of together {BUDGET >> 30} GiB)',
    )
    test = parser.add_argument_group('self-test')
    test.add_argument(
        '--self-test',
        action='store_true',
        help='compare weight 0 with stock training, bit for bit',
    )
    test.add_argument(
        '--configs', type=int, default=40, metavar='N', help='how many (40)'
    )
    test.add_argument(
        '--seed', type=int, default=0, help='of all that is drawn (0)'
    )
    test.add_argument(
        '--jobs', type=int, default=1, metavar='N', help='at a time (1)'
    )
    test.add_argument(
        '--only',
        default='',
        metavar='PATTERN',
        help='instead of a draw, all configs whose names match',
    )
    args = parser.parse_args(argv)
    if args.self_test == (args.config is not None):
        parser.error('give either a config or --self-test')
    return args


def sample_size(text: str) -> int:
    """Parse ``--data-sample``; -1 stands for all."""
    return -1 if text == 'all' else whole_number(0)(text)


def examine_data(args: argparse.Namespace) -> Report:
    """Examine the data of a config, or of a folder."""
    report = Report()
    if args.config in FOLDERS or not is_config(args.config):
        data = find_data(args.config)
        say_found(data, report)
        cfg = data_config(data)
    else:
        cfg = read_config(args.config)
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    check_data(cfg, report, args.data_sample)
    return report


def is_config(name: str) -> bool:
    """Whether a name is meant as that of a config, and not of data."""
    return name.endswith('.py') or '::' in name


def show(
    report: Report, path: Path | None = None, *, verbose: bool = False
) -> int:
    """Print a report; returns the exit status."""
    width = min(get_terminal_size().columns, 100) * sys.stdout.isatty()
    print(report.text(verbose=verbose, width=width), flush=True)
    if path is not None:
        content = {
            'findings': report.findings,
            'stops': report.stops,
            'warns': report.warns,
            'notes': report.notes,
            'sections': report.sections,
            **report.values,
        }
        path.write_text(json.dumps(content, indent=1) + '\n')
    return 1 if report.stops else 0


def examine_mmkd(args: argparse.Namespace) -> int:
    """Run the self-test; returns the exit status."""
    from .self_test import passed, self_test, summary

    result = self_test(args.seed, args.configs, jobs=args.jobs, only=args.only)
    print('\n' + summary(result), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + '\n')
    return 0 if passed(result) else 1


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.self_test:
        return examine_mmkd(args)
    if args.data_only:
        return show(examine_data(args), args.json)
    with telling() as progress, hushed():
        cfg = load_config(args.config)
        if args.cfg_options is not None:
            cfg.merge_from_dict(args.cfg_options)
        report = diagnose(
            cfg, evaluate=args.eval, sample=args.data_sample, progress=progress
        )
    return show(report, args.json, verbose=args.verbose)


@contextmanager
def telling() -> Iterator[Callable[[str], None]]:
    """Show in a line of the terminal what is being done, while it is."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with os.fdopen(os.dup(sys.stderr.fileno()), 'w') as terminal:

        def tell(what: str) -> None:
            terminal.write(
                f'\r\x1b[Kexamining {what} …' if what else '\r\x1b[K'
            )
            terminal.flush()

        try:
            yield tell
        finally:
            tell('')
