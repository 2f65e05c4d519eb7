"""Prepare the data sets of the configs, below `data/`.

    python tools/prepare_data.py coco      COCO 2017, 20 GB
    python tools/prepare_data.py voc       Pascal VOC 2007 and 2012, 3 GB
    python tools/prepare_data.py bccd      blood cells, 364 photos, 8 MB
    python tools/prepare_data.py neon      tree crowns, 247 tiles, 21 MB

Each downloads, checks, and unpacks or converts; with `--from` it links (or
with `--copy` copies) what is on this machine already. Run again, it continues
what was interrupted and leaves alone what is there. `CMD --help` tells more.
"""

import argparse
import errno
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmkd.data.download import AGAIN
from mmkd.errors import DataError

from .bccd import BCCD_HELP, prepare_bccd
from .coco import COCO_HELP, prepare_coco
from .neon import NEON_HELP, prepare_neon
from .voc import VOC_HELP, VOC_PARTS, prepare_voc


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=layout
    )
    commands = parser.add_subparsers(metavar='CMD', required=True)

    def add(name: str, text: str, run: Any, **source: Any) -> Any:
        command = commands.add_parser(
            name, description=text, formatter_class=layout
        )
        command.set_defaults(run=run, copy=False)
        command.add_argument(
            '--root',
            type=Path,
            default=Path('data'),
            help='folder of all data sets (default: %(default)s)',
        )
        command.add_argument(
            '--from',
            dest='source',
            type=Path,
            help='use what is on this machine, and download nothing',
            **source,
        )
        command.add_argument(
            '--delete-archives',
            action='store_true',
            help='delete what was downloaded once it is unpacked',
        )
        return command

    coco = add('coco', COCO_HELP, prepare_coco, metavar='FOLDER')
    coco.add_argument(
        '--split',
        choices=('train', 'val', 'all'),
        default='all',
        help='prepare only this one (default: %(default)s)',
    )
    voc = add(
        'voc',
        VOC_HELP,
        prepare_voc,
        metavar='FOLDER_OR_TAR',
        nargs='+',
        default=[],
    )
    voc.add_argument(
        '--parts',
        nargs='+',
        choices=tuple(VOC_PARTS),
        default=list(VOC_PARTS),
        help='prepare only these (default: all)',
    )
    bccd = add('bccd', BCCD_HELP, prepare_bccd, metavar='FOLDER_OR_ZIP')
    add('neon', NEON_HELP, prepare_neon, metavar='WHEEL')
    for command in (coco, voc, bccd):
        command.add_argument(
            '--copy',
            action='store_true',
            help='with --from FOLDER: copy it instead of linking to it',
        )
    args = parser.parse_args(argv)
    if args.copy and not args.source:
        parser.error('--copy goes with --from FOLDER')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        args.run(args)
    except DataError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    except ImportError as error:
        remedy = 'Install opencv-python-headless.'
        print(f'error: {error}. {remedy}', file=sys.stderr)
        return 1
    except OSError as error:
        where = f'{error.filename}: ' if error.filename else ''
        what = error.strerror or str(error)
        if error.errno == errno.ENOSPC:
            what += f'. Free some space. {AGAIN}'
        print(f'error: {where}{what}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f'\ninterrupted. {AGAIN}', file=sys.stderr)
        return 130
    return 0
