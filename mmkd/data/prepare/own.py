"""Data of the user's own: converted from any common layout."""

import argparse
import os
from pathlib import Path

from mmkd.errors import DataError

from ..layouts import prepare
from ..layouts.convert import Options
from .common import say

OWN_HELP = """\
Your own data, from any common layout: YOLO (data.yaml, or images and labels
alone), COCO (also of Roboflow, CVAT and Label Studio), Pascal VOC's XML, or a
table of boxes (CSV). Annotations in COCO's format are written to
OUT/annotations; the images stay where they are, and nothing is written there.
Data that are not split yet are split at random such that every class is in
each part. Run again, each image keeps its split, and new ones are added.
`mmkd distill --data PATH` does the same without further options.

    mmkd prepare own my_data
    mmkd prepare own my_data/data.yaml --split .7 .2 .1 --seed 1
    mmkd prepare own my_data --classes car person --out data/traffic
"""
SHOWN = 5
"""So many places are shown of each kind of fault."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    what = 'a folder, or the YAML, JSON or CSV file that describes the data'
    add('path', metavar='PATH', help=what)
    what = 'folder of the annotations (default: data/NAME)'
    add('--out', type=Path, help=what)
    what = 'fractions of the images to train, to validate and, if there are '
    what += 'three, to test on (default: the split that the data have, or '
    what += '.8 .2)'
    add('--split', type=float, nargs='+', metavar='FRACTION', help=what)
    add('--seed', type=int, help='of the split (default: 0)')
    what = 'only these, in this order; or the names of numbered classes'
    add('--classes', nargs='+', metavar='NAME', help=what)


def prepare_own(args: argparse.Namespace) -> None:
    if args.split is not None:
        _check_fractions(args.split)
    options = Options(
        tuple(args.split) if args.split else None,
        args.seed,
        tuple(args.classes) if args.classes else None,
    )
    data, folder = prepare(args.path, args.out, options)
    say('\n'.join(data.summary))
    for kind, places in data.faults.items():
        say(f'{kind} ({len(places):,}):')
        for place in places[:SHOWN]:
            say(f'  {place}')
        if len(places) > SHOWN:
            say(f'  and {len(places) - SHOWN:,} more')
    inside = folder.is_relative_to(Path.cwd())
    say(f'mmkd distill --data {os.path.relpath(folder) if inside else folder}')


def _check_fractions(fractions: list[float]) -> None:
    if (
        len(fractions) not in (2, 3)
        or not all(0 < each < 1 for each in fractions)
        or abs(sum(fractions) - 1) > 1e-6
    ):
        given = ' '.join(f'{each:g}' for each in fractions)
        raise DataError(
            f'--split: expected 2 or 3 fractions that add up to 1, such as '
            f'.8 .2, got {given}.'
        )
