"""Write a detector as an ONNX file, and check it with onnxruntime.

The graph goes from the pixels of a picture to boxes after suppression, with
normalisation, thresholds and the limit on the number of boxes of the config.
A file NAME.onnx.json beside it says what goes in and comes out. Without
--no-check, both find the same in pictures, or nothing is written.

Examples:
    mmkd export my_student.py work_dirs/x/epoch_12.pth --onnx
    mmkd export CONFIG CHECKPOINT --onnx --out student.onnx --size 480 640
    mmkd export CONFIG CHECKPOINT --onnx --images photos/
"""

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model.utils import revert_sync_batchnorm

from mmkd.data.checkpoint_loader import trusts
from mmkd.data.files import replacing, write_text
from mmkd.detectors.facts import box_class_names
from mmkd.detectors.graph import REMEDY, detector_graph
from mmkd.detectors.pixels import flips, mean_std, pad_value
from mmkd.detectors.source import (
    build_trained,
    check_class_count,
    class_names,
    load_config,
)
from mmkd.errors import ConfigError, ExportError, PackageError
from mmkd.utils import add_cfg_options, whole_number
from mmkd.version import __version__

from .canvas import Canvas, canvas_for
from .check import Check, check, pictures_for

ONNX = ('', 'ai.onnx')
"""The domains of ONNX's own operators."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='mmkd export',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', help='config file, or mmkd::NAME')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument(
        '--onnx',
        action='store_true',
        help='the format of the file, and the only one there is',
    )
    parser.add_argument(
        '--out',
        type=Path,
        metavar='FILE',
        help='the file (default: that of the checkpoint, ending in .onnx)',
    )
    parser.add_argument(
        '--size',
        type=whole_number(1),
        nargs=2,
        metavar=('H', 'W'),
        help='height and width of the images that the graph takes (default: '
        'those of the test pipeline)',
    )
    parser.add_argument(
        '--no-check',
        action='store_true',
        help='write the file without comparing it with PyTorch',
    )
    parser.add_argument(
        '--images',
        type=Path,
        metavar='FOLDER',
        help='pictures to check on (default: those of the test data, or else '
        'drawn ones)',
    )
    parser.add_argument(
        '--num-images',
        type=whole_number(1),
        default=8,
        metavar='N',
        help='the number of pictures (default: %(default)s)',
    )
    parser.add_argument(
        '--threads',
        type=whole_number(1),
        default=1,
        help='CPU threads of the check (default: %(default)s)',
    )
    add_cfg_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    check_packages(check=not args.no_check)
    if not args.onnx:
        raise ConfigError('export writes one format so far: add --onnx.')
    config = load_config(args.config)
    if args.cfg_options:
        config.merge_from_dict(args.cfg_options)
    path = args.out or beside(args.checkpoint)
    check_place(path)
    logging.disable(logging.WARNING)  # a line for each parameter
    torch.set_num_threads(args.threads)
    model, classes = load(config, args.config, args.checkpoint)
    divisor = getattr(model.data_preprocessor, 'pad_size_divisor', 1)
    canvas = canvas_for(config, divisor, args.size and tuple(args.size))
    print(summary(model, classes, canvas))
    given = None
    if not args.no_check:
        given = pictures_for(config, args.images, args.num_images)
    about = describe(model, classes, canvas)
    graph = finish(detector_graph(model, canvas.shape, canvas.padding), about)
    if given:
        pictures, where = given
        print(f'checked on {len(pictures)} pictures {where}:')
        compare(check(model, graph, canvas, pictures), args.threads)
    with replacing(path) as file:
        file.write(graph)
    card = path.with_name(f'{path.name}.json')
    write_text(card, json.dumps(about, indent=1) + '\n')
    print(f'{path} ({len(graph) / 1e6:.1f} MB) and {card.name} are written')


def beside(checkpoint: str) -> Path:
    """The file of a checkpoint's name, or, for a URL, in this folder."""
    path = Path(checkpoint)
    path = path if path.is_file() else Path(path.name)
    return path.with_suffix('.onnx')


def summary(model: Any, classes: Sequence[str], canvas: Canvas) -> str:
    """Say what is exported, and what of it is not."""
    ratio = 'keeps its shape' if canvas.keep_ratio else 'is stretched'
    number = f'{len(classes)} class{"es" * (len(classes) != 1)}'
    lines = [
        f'{type(model).__name__} with {number}; images of '
        f'{canvas.height} x {canvas.width} (H x W), in which a picture '
        f'{ratio}'
    ]
    if getattr(model, 'with_mask', False):
        lines.append('  left out: masks; the graph gives boxes')
    if canvas.unknown:
        lines.append(
            f'  left out: {", ".join(canvas.unknown)} of the test pipeline, '
            'which the graph does not do'
        )
    return '\n'.join(lines)


def check_packages(*, check: bool) -> None:
    needed = ('onnx', 'onnxruntime') if check else ('onnx',)
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise PackageError(
            f'mmkd export needs {" and ".join(missing)}: pip install '
            "'mmkd[onnx]'"
        )


def check_place(path: Path) -> None:
    """Fail before the work where the file could not be written after it."""
    if path.is_dir():
        raise ConfigError(
            f'--out: {path} is a folder. Give the name of a file in it.'
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def load(
    config: Config, source: str, checkpoint: str
) -> tuple[Any, tuple[str, ...]]:
    """Build the detector of a config, and name its classes."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of MMDetection, about itself
        model, meta = build_trained(
            config.model, checkpoint, trust=trusts(config), who='detector'
        )
    detector: Any = revert_sync_batchnorm(model).eval()
    if not hasattr(detector, 'data_preprocessor') or not hasattr(
        detector, 'predict'
    ):
        raise ConfigError(
            f'{source}: a {type(detector).__name__} is no single detector of '
            "MMDetection's. Give the config and the checkpoint of one."
        )
    names = class_names(meta, config)
    if names is None:
        raise ConfigError(
            f'{source}: neither {checkpoint} nor the config names the '
            'classes. Name them in the config through '
            'test_dataloader.dataset.metainfo=dict(classes=...).'
        )
    check_class_count(detector, names, source, 'the checkpoint or the config')
    return detector, box_class_names(detector, names)


def describe(
    model: Any, classes: Sequence[str], canvas: Canvas
) -> dict[str, Any]:
    """Say what goes into a graph, and what comes out."""
    mean, std = mean_std(model.data_preprocessor)
    after = canvas.padding is None
    return dict(
        detector=type(model).__name__,
        classes=list(classes),
        height=canvas.height,
        width=canvas.width,
        keep_ratio=canvas.keep_ratio,
        inputs=dict(
            image='uint8 (height, width, 3), BGR, with the resized picture '
            'in the upper left corner',
            size='int64 (2), height and width of the resized picture',
        ),
        outputs=dict(
            boxes='float32 (N, 4), x1 y1 x2 y2 in pixels of the image',
            scores='float32 (N)',
            labels='int64 (N), numbers of classes, from 0',
        ),
        in_the_graph=dict(
            channel_order='RGB' if flips(model.data_preprocessor) else 'BGR',
            mean=mean.tolist(),
            std=std.tolist(),
            padding=pad_value(model.data_preprocessor)
            if after
            else canvas.padding,
            padded='after normalisation' if after else 'before normalisation',
        ),
        mmkd=__version__,
    )


def finish(graph: bytes, described: Mapping[str, Any]) -> bytes:
    """Check a graph, and put what describes it into its metadata."""
    import onnx

    model = onnx.load_from_string(graph)
    foreign = {
        node.op_type for node in model.graph.node if node.domain not in ONNX
    }
    if foreign:
        raise ExportError(
            f'the detector has operators that ONNX lacks: '
            f'{", ".join(sorted(foreign))}. {REMEDY}'
        )
    onnx.checker.check_model(model)
    onnx.helper.set_model_props(
        model, {key: json.dumps(value) for key, value in described.items()}
    )
    model.producer_name, model.producer_version = 'mmkd', __version__
    return model.SerializeToString(deterministic=True)


def compare(result: Check, threads: int) -> None:
    """Print how far onnxruntime is from PyTorch.

    Raises:
        ExportError: If it is too far.
    """
    print(result.text(threads))
    if not result.boxes:
        print(
            '  no picture has a box: this says little; give others (--images)'
        )
    if not result.same:
        raise ExportError(
            f'onnxruntime does not find what PyTorch finds: of {result.boxes} '
            f'boxes, only PyTorch has {result.only_torch}, and only '
            f'onnxruntime has {result.only_onnx} more. Nothing is written. '
            f'{REMEDY} --no-check writes it all the same.'
        )
