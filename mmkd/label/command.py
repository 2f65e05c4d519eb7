r"""Write down what a detector finds in images, as COCO JSON.

Any detector labels: one of MMDetection, an ONNX file, a Python function. Any
stock student learns from the result: `mmkd distill --teacher labels.json`.
A run that was stopped goes on with the same command.

Examples:
    mmkd label photos/ --teacher detector.onnx --out labels.json \
        --teacher-options classes=coco --preview 12
    mmkd label data/coco/annotations/instances_val2017.json \
        --teacher retinanet_r101_fpn_2x_coco --out labels.json \
        --against data/coco/annotations/instances_val2017.json
    mmkd label street.mp4 --teacher my_module:detect --out labels.json \
        --teacher-options classes=[person,car] --jobs 4
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from mmkd.data.errors import some
from mmkd.errors import ConfigError, DataError
from mmkd.start.config_text import teacher_options
from mmkd.utils import CfgOptions, whole_number

from .detector import Detector, build_detector, described
from .journal import Journal
from .preview import write_previews
from .result import KEY, Result, known_result, result_of
from .scores import compare
from .source import Item, Source, find_source
from .work import label_all, label_together


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='mmkd label',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'source',
        help='a folder of images, a COCO file, an image, a video, or data in '
        'any layout of `mmkd prepare own`',
    )
    parser.add_argument(
        '--teacher',
        required=True,
        help="a config, a name in MMDetection's model index, an ONNX file, a "
        'function (module:function), or the type of a registered teacher',
    )
    parser.add_argument('--teacher-checkpoint', help='path or URL')
    parser.add_argument(
        '--teacher-options',
        nargs='+',
        default={},
        action=CfgOptions,
        metavar='KEY=VALUE',
        help='options of the teacher, such as classes=coco',
    )
    parser.add_argument(
        '--texts',
        nargs='+',
        default=[],
        metavar='CLASS',
        help='the classes of a detector that is told them as text '
        '(Grounding DINO, GLIP)',
    )
    parser.add_argument(
        '--out', type=Path, required=True, help='the COCO JSON to write'
    )
    parser.add_argument(
        '--split',
        choices=('train', 'val', 'test'),
        help='take a split of the data in SOURCE, instead of all its images',
    )
    parser.add_argument(
        '--images',
        type=Path,
        metavar='FOLDER',
        help='the folder that the names in a COCO file begin in',
    )
    parser.add_argument(
        '--score-thr',
        type=_share,
        default=0.05,
        metavar='SCORE',
        help='leave out boxes of a lower score (default: %(default)s)',
    )
    parser.add_argument(
        '--jobs',
        type=whole_number(1),
        default=1,
        metavar='N',
        help='processes (default: %(default)s)',
    )
    parser.add_argument(
        '--against',
        type=Path,
        metavar='ANNOTATIONS',
        help='ground truth in COCO format to compare the labels with',
    )
    parser.add_argument(
        '--preview',
        type=whole_number(1),
        metavar='N',
        help='draw the boxes on N of the images',
    )
    parser.add_argument('--overwrite', action='store_true', help='begin again')
    return parser.parse_args(argv)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(
            f'takes a score from 0 to 1, got {text[:40]!r}'
        )
    return value


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    _check_out(args.out)
    source = find_source(args.source, args.images, args.split)
    options = teacher_options(
        args.teacher, args.teacher_checkpoint, None, args.teacher_options
    )
    detector = build_detector(options, args.texts)
    about = dict(
        source=source.where,
        images=len(source.items),
        teacher=described(options),
        options=repr(sorted(options.items())),
        identity=getattr(detector, 'identity', b'').hex(),
        classes=list(detector.classes),
        score_thr=args.score_thr,
    )
    content = None if args.overwrite else _complete(args.out, about)
    if content is None:
        result = _label(args, source, options, detector, about)
        content = result.content
    if args.against:
        comparison = compare(content, args.against)
        print('\n' + comparison.text())
        chart = args.out.with_suffix('.calibration.svg')
        comparison.draw(chart)
        print(f'\ncalibration: {chart}')
    if args.preview:
        folder = args.out.with_suffix('.preview')
        pictures = write_previews(
            source, source.items, content, args.preview, folder
        )
        print(f'{len(pictures)} pictures: {folder}')


def _check_out(out: Path) -> None:
    """Fail before the work where the result could not be written after it."""
    if out.is_dir() or out.suffix != '.json':
        raise ConfigError(
            f'--out {out} must be the name of a .json file to write.'
        )


def _complete(out: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """Return the content of a result that is complete, of the same run.

    Raises:
        ConfigError: If the file is another one.
    """
    if not out.exists():
        return None
    content = known_result(out)
    if content is None or content['info'][KEY] != about:
        raise ConfigError(
            f'--out {out} exists, and holds something else. Give another '
            'name, or --overwrite.'
        )
    print(f'{out} is complete: {_counted(content)}')
    return content


def _label(
    args: argparse.Namespace,
    source: Source,
    options: dict[str, Any],
    detector: Detector,
    about: dict[str, Any],
) -> Result:
    journal = Journal(args.out, about, anew=args.overwrite)
    # What has failed is tried again: the file may have been brought back.
    done = {
        repr(line['id']) for line in journal.lines() if 'fault' not in line
    }
    left = [item for item in source.items if repr(item.id) not in done]
    if done:
        print(f'going on: {len(done)} of {len(source.items)} images are done')
    _look(args, source, left, options, detector, journal)
    result = result_of(source.items, journal.lines(), detector.classes, about)
    _tell_faults(result, source)
    if not result.content['images']:
        raise DataError(
            f'{source.where}: expected images, got {len(source.items)} that '
            f'cannot be read. {next(iter(result.faults.values()))}'
        )
    result.write(args.out)
    journal.remove()
    print(f'{args.out}: {_counted(result.content)}')
    return result


def _look(
    args: argparse.Namespace,
    source: Source,
    left: Sequence[Item],
    options: dict[str, Any],
    detector: Detector,
    journal: Journal,
) -> None:
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task('labelling', total=len(left))

        def tell(count: int) -> None:
            progress.advance(task, count)

        if args.jobs == 1:
            label_all(source, left, journal, detector, args.score_thr, tell)
            return
        label_together(
            source,
            left,
            journal,
            options,
            args.texts,
            args.score_thr,
            args.jobs,
            tell,
        )


def _counted(content: dict[str, Any]) -> str:
    seen = {repr(row['image_id']) for row in content['annotations']}
    count = len(content['images'])
    return (
        f'{len(content["annotations"])} boxes on {count} images, '
        f'{count - len(seen)} of them without any'
    )


def _tell_faults(result: Result, source: Source) -> None:
    if result.faults:
        shown = [f'{name}: {why}' for name, why in result.faults.items()]
        print(
            f'warning: {len(shown)} of {len(source.items)} images could not '
            f'be looked at, and are not in the result: {some(shown)}',
            file=sys.stderr,
        )
