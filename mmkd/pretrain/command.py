r"""Pretrain the backbones of detectors on images without labels.

SimCLR: two random views of each image are to be alike, and unlike those of the
other images (NT-Xent). With several configs (DoGo), each backbone also learns
from the similarities that the others find. Each becomes a stock checkpoint,
WORK_DIR/NAME_backbone.pth, that its detector begins with (init_cfg).

Examples:
    mmkd pretrain mmdet::retinanet/retinanet_r50_fpn_1x_coco.py \
        --images photos/ --from-scratch
    mmkd pretrain small.py big.py --images photos/ --optimizer adamw
    mmkd pretrain student.py --images train.json --val val.json --resume
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import RUNNERS

from mmkd.data.files import write_text
from mmkd.detectors.source import load_config
from mmkd.engine.checkpoint import latest_checkpoint
from mmkd.engine.runner import DistillationRunner
from mmkd.engine.work_dir import check_no_training, one_training
from mmkd.errors import ConfigError, WorkDirError
from mmkd.utils import add_cfg_options, whole_number

from .augment import check_crops, check_kornia
from .config import (
    DOGO_WEIGHTS,
    OPTIMIZERS,
    Options,
    network_name,
    network_options,
    pretraining_config,
)
from .images import Images, find_images, find_objects

METHODS = ('ntxent', 'dogo')
LIST = 'images.txt'
CONFIG = 'pretrain.py'


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='mmkd pretrain',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        'configs',
        nargs='+',
        metavar='CONFIG',
        help='config of a stock detector: a file, or mmdet::NAME',
    )
    add(
        '--images',
        required=True,
        metavar='SOURCE',
        help="a folder, a file in COCO's format, or data in a common layout, "
        'of which only the training images are used',
    )
    add(
        '--val',
        metavar='SOURCE',
        help='labelled data whose objects measure progress, as they are '
        'classified by their nearest neighbours',
    )
    add('--work-dir', type=Path, help='(default: work_dirs/pretrain_…)')
    add(
        '--method',
        choices=METHODS,
        help='ntxent: each network learns alone; dogo: from the others, too '
        '(default: dogo for several configs)',
    )
    _add_training(parser)
    _add_views(parser)
    add(
        '--no-train',
        action='store_true',
        help='write the config only, for mmkd train on several processes',
    )
    add('--resume', action='store_true', help='go on where the run stopped')
    add_cfg_options(parser)
    return parser.parse_args(argv)


def _add_training(parser: argparse.ArgumentParser) -> None:
    add, own = parser.add_argument, Options()
    shown = '(default: %(default)s)'
    add('--epochs', type=whole_number(1), default=own.epochs, help=shown)
    add(
        '--batch-size',
        type=whole_number(1),
        default=own.batch_size,
        metavar='B',
        help=f'images of a step in each process {shown}',
    )
    add(
        '--optimizer',
        choices=[*OPTIMIZERS],
        default=own.optimizer,
        help=f'adamw suits batches below about 256 {shown}',
    )
    what = 'the highest learning rate (default: .3 for lars, .001 for adamw, '
    add('--lr', type=float, help=what + 'times B / 256)')
    add('--weight-decay', type=float, help='(default: .0001)')
    what = 'epochs in which the learning rate rises '
    add(
        '--warmup-epochs',
        type=whole_number(0),
        metavar='N',
        help=what + '(default: a tenth of them, at most 10)',
    )
    what = f"that of NT-Xent's similarities {shown}"
    add('--temperature', type=float, default=own.temperature, help=what)
    first, others = DOGO_WEIGHTS
    add(
        '--kl-weight',
        type=float,
        nargs='+',
        metavar='W',
        help="DoGo's weight of the others' similarities, one for each config "
        f'or one for all (default: {first:g} for the first, {others:g} for '
        'the others)',
    )
    what = f"that of DoGo's similarities {shown}"
    add('--kl-temperature', type=float, default=own.kl_temperature, help=what)
    what = 'leave out the weights that the configs begin with (init_cfg)'
    add('--from-scratch', action='store_true', help=what)
    add('--seed', type=whole_number(0), default=own.seed, help=shown)
    add(
        '--workers',
        type=whole_number(0),
        default=own.workers,
        help=f'processes that load images {shown}',
    )


def _add_views(parser: argparse.ArgumentParser) -> None:
    add, own = parser.add_argument, Options()
    shown = '(default: %(default)s)'
    what = f'sides of the crops in pixels {shown}'
    add('--size', type=whole_number(1), default=own.size, help=what)
    what = f'parts of the area of an image that are cut out {shown}'
    add(
        '--crop-scale',
        type=float,
        nargs=2,
        default=own.scale,
        metavar=('MIN', 'MAX'),
        help=what,
    )
    what = f'strength of the changes of colour {shown}'
    add('--color-strength', type=float, default=own.strength, help=what)
    add(
        '--blur',
        type=float,
        default=own.blur,
        metavar='P',
        help=f'probability of a blur {shown}',
    )
    add(
        '--projection',
        type=whole_number(2),
        default=own.projection,
        metavar='D',
        help=f'length of what the loss compares {shown}',
    )
    add(
        '--eval-interval',
        type=whole_number(1),
        default=own.interval,
        metavar='N',
        help=f'epochs between two measurements {shown}',
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    check_kornia()
    check(args)
    networks, imports = read_networks(args)
    folder = args.work_dir or Path(
        'work_dirs', f'pretrain_{"_".join(networks)}'
    )
    check_work_dir(folder, resume=args.resume)
    images = find_images(args.images, args.size)
    print('\n'.join(images.in_words(args.size)))
    tell_networks(networks)
    if args.val:
        tell_objects(args.val, images)
    folder.mkdir(parents=True, exist_ok=True)
    with one_training(str(folder)):
        files = keep_list(folder / LIST, images.files, resume=args.resume)
        cfg = pretraining_config(
            networks,
            folder / LIST,
            len(files),
            options_of(args),
            imports,
        )
        if args.cfg_options:
            cfg.merge_from_dict(args.cfg_options)
        train(cfg, folder, args)


def read_networks(
    args: argparse.Namespace,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the networks of the configs, and the modules these import."""
    networks: dict[str, dict[str, Any]] = {}
    imports: list[str] = []
    for source in args.configs:
        config = load_config(source)
        name = network_name(source, networks)
        networks[name] = network_options(
            config, source, scratch=args.from_scratch
        )
        found = (config.get('custom_imports') or {}).get('imports', ())
        imports += [found] if isinstance(found, str) else found
    return networks, [*dict.fromkeys(imports)]


def train(cfg: Config, folder: Path, args: argparse.Namespace) -> None:
    """Write the config, and train unless that is not wanted."""
    cfg.work_dir = str(folder)
    path = folder / CONFIG
    cfg.dump(str(path))
    print(f'config: {path}', flush=True)
    if args.no_train:
        print(f'Train it with: mmkd train {path} --work-dir {folder}')
        return
    cfg = Config.fromfile(path)
    cfg.resume = args.resume
    runner: DistillationRunner = RUNNERS.build(cfg)
    runner.train()


# ------------------------------------------------------------------- options


def check(args: argparse.Namespace) -> None:
    """Check what the command line says as a whole.

    Raises:
        ConfigError: If something does not fit the rest.
    """
    if args.batch_size < 2:
        raise ConfigError(
            '--batch-size must be at least 2, because images are contrasted '
            f'with each other, got {args.batch_size}. SimCLR gains up to '
            'thousands.'
        )
    if args.method is None:
        args.method = 'dogo' if len(args.configs) > 1 else 'ntxent'
    if args.method == 'dogo' and len(args.configs) < 2:
        raise ConfigError(
            '--method dogo trains networks that learn from each other: give '
            'two or more configs, got one.'
        )
    check_crops(args.size, tuple(args.crop_scale))
    if args.kl_weight is not None:
        check_weights(args.kl_weight, args.method, len(args.configs))


def check_weights(weights: Sequence[float], method: str, count: int) -> None:
    """Check ``--kl-weight``.

    Args:
        weights: What it says.
        method: One of :data:`METHODS`.
        count: The number of networks.

    Raises:
        ConfigError: If it does not fit, or a weight is below 0.
    """
    if method != 'dogo':
        raise ConfigError(
            '--kl-weight is for --method dogo, with two or more configs.'
        )
    if len(weights) not in (1, count):
        raise ConfigError(
            f'--kl-weight takes one number, or one for each of the {count} '
            f'configs, got {len(weights)}.'
        )
    if min(weights) < 0:
        raise ConfigError(
            f'--kl-weight must be at least 0, got {min(weights):g}.'
        )


def options_of(args: argparse.Namespace) -> Options:
    count = len(args.configs)
    weights: Sequence[float] = ()
    if args.method == 'dogo':
        first, others = DOGO_WEIGHTS
        weights = args.kl_weight or [first, *[others] * (count - 1)]
        if len(weights) == 1:
            weights = [*weights] * count
    return Options(
        epochs=args.epochs,
        batch_size=args.batch_size,
        optimizer=args.optimizer,
        lr=args.lr,
        weight_decay=args.weight_decay,
        warmup=args.warmup_epochs,
        temperature=args.temperature,
        kl_weights=weights,
        kl_temperature=args.kl_temperature,
        size=args.size,
        scale=(args.crop_scale[0], args.crop_scale[1]),
        strength=args.color_strength,
        blur=args.blur,
        projection=args.projection,
        interval=args.eval_interval,
        annotations=args.val,
        workers=args.workers,
        seed=args.seed,
    )


# --------------------------------------------------------------- what is there


def check_work_dir(folder: Path, *, resume: bool) -> None:
    """Refuse a folder that holds another run, of which nothing is lost.

    Raises:
        WorkDirError: If a run is there, and is not to be resumed, or if a
            training is at work.
        ConfigError: If it is a file.
    """
    if folder.is_file():
        raise ConfigError(
            f'--work-dir {folder} is a file. Give the name of a folder.'
        )
    check_no_training(str(folder))
    if not folder.is_dir() or resume:
        return
    if found := latest_checkpoint(str(folder)):
        raise WorkDirError(
            f'{folder} holds a run that has been begun ({found}). Go on with '
            '--resume, or choose another --work-dir.'
        )


def keep_list(
    path: Path, files: Sequence[str], *, resume: bool
) -> Sequence[str]:
    """Write the list of images, or keep that of the run that is resumed."""
    known = path.read_text().splitlines() if path.is_file() else []
    if resume and known:
        if known != [*files]:
            print(
                f'The images have changed since the run began ({len(known):,} '
                f'then, {len(files):,} now): it goes on with those of {path}.'
            )
        return known
    write_text(path, ''.join(f'{file}\n' for file in files))
    return files


def tell_networks(networks: dict[str, dict[str, Any]]) -> None:
    for name, options in networks.items():
        backbone = options['backbone']
        begins = backbone.get('init_cfg')
        weights = begins.get('checkpoint') if isinstance(begins, dict) else ''
        start = f'begins with {weights}' if weights else 'from scratch'
        print(f'{name}: {backbone.get("type")}, {start}')


def tell_objects(source: str, images: Images) -> None:
    """Check the labelled data, and say how many of them are trained on."""
    pictures, _ = find_objects(source)
    known = {*images.files}
    both = sum(str(Path(p.path).absolute()) in known for p in pictures)
    if both:
        print(
            f'{both:,} of the {len(pictures):,} images of --val are trained '
            'on as well (their labels are not)'
        )
