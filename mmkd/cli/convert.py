r"""Give weights of another library the names of a stock module.

    mmkd convert FILE OUT --to CONFIG

FILE is what torchvision, timm, mmcls, mmpretrain or the authors of Swin have
saved, or a checkpoint of a wrapped network; OUT is what `init_cfg` of CONFIG's
backbone takes. Without --to it is the stock module that FILE fits. OUT is
written when every tensor of the module was loaded from it, or not at all.

Examples:
    mmkd convert mobilenet_v2-b0353104.pth mobilenet_v2.pth
    mmkd convert swin_tiny.pth swin.pth \
        --to mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py
"""

import argparse
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmdet.models.backbones import RegNet
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from torch import nn

from mmkd.data.checkpoint_file import write_atomically
from mmkd.data.checkpoint_loader import safe_checkpoints
from mmkd.data.checkpoint_reader import read_checkpoint
from mmkd.data.foreign_weights import (
    State,
    convert_state_dict,
    origin,
    weights_in,
)
from mmkd.detectors.source import build_untrained, load_config
from mmkd.errors import CheckpointError, ConfigError, hushed

SWIN_DEPTHS = ((2, 2, 6, 2), (2, 2, 18, 2))
STOCK: dict[str, tuple[dict[str, Any], ...]] = {
    'MobileNet': (dict(type='MobileNetV2'),),
    'RegNet': tuple(dict(type='RegNet', arch=a) for a in RegNet.arch_settings),
    'ResNet-D': tuple(
        dict(type='ResNetV1d', depth=depth) for depth in (50, 101, 152)
    ),
    'ResNet': tuple(
        dict(type='ResNet', depth=depth) for depth in (18, 34, 50, 101, 152)
    ),
    'Swin': tuple(
        dict(
            type='SwinTransformer',
            **dict(embed_dims=width, depths=depths, window_size=window),
            num_heads=[width // 32 * 2**stage for stage in range(4)],
        )
        for depths in SWIN_DEPTHS
        for width in (96, 128, 192)
        for window in (7, 12)
    ),
}
"""The stock modules that are tried without --to, by a word in the origin."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='mmkd convert',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('file', type=Path, help='what the library has saved')
    parser.add_argument('out', type=Path, help='the checkpoint to write')
    parser.add_argument(
        '--to', metavar='CONFIG', help='config of the detector that loads it'
    )
    parser.add_argument(
        '--module',
        default='backbone',
        help="the detector's part that takes the weights (default: "
        "%(default)s); '' for all of it",
    )
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='unpickle whatever FILE holds, which can run any code',
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.file.resolve() == args.out.resolve():
        raise ConfigError(
            f'FILE and OUT are both {args.out}. Give another name to write to.'
        )
    content = read_checkpoint(
        str(args.file), trust=args.trust_checkpoint, opt_in=OPT_IN
    )
    try:
        _, state = weights_in(content)
        whose = origin(state)
        if args.to is None:
            module, converted, left_over = _stock(state, whose)
        else:
            module = _part(args.to, args.module)
            converted, left_over = convert_state_dict(state, module)
    except CheckpointError as error:
        raise CheckpointError(f'{args.file}: {error}') from None
    swin = hasattr(module, 'convert_weights')
    _write(args.out, converted, module)
    print(f'{args.file}: {len(state)} tensors{" of " * bool(whose)}{whose}')
    print(
        f'{args.out}: {len(converted)} of {len(converted)} tensors of '
        f'{type(module).__name__}, loaded and compared'
    )
    if left_over:
        print(f'left over: {", ".join(left_over)}')
    part = args.module or 'model'
    print(
        f"\nUse it in {part}: init_cfg=dict(type='Pretrained', "
        f"checkpoint='{args.out}')"
    )
    if swin:
        print('and convert_weights=False there.')
    if whose.startswith('torchvision'):
        print(
            'torchvision trains on RGB: mean=[123.675, 116.28, 103.53], '
            'std=[58.395, 57.12, 57.375] and bgr_to_rgb=True in '
            'data_preprocessor.'
        )


OPT_IN = 'by --trust-checkpoint'


def _part(config: str, path: str) -> nn.Module:
    """Build a detector and return the part that takes the weights."""
    detector = build_untrained(load_config(config).model)
    try:
        return detector.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in detector.named_children()]
        raise ConfigError(
            f'--module {path}: the {type(detector).__name__} of {config} has '
            f'no such part. It has {", ".join(names)}.'
        ) from None


def _stock(state: State, whose: str) -> tuple[nn.Module, Any, list[str]]:
    """Return the stock module that weights fit, and the weights for it."""
    register_all_modules(init_default_scope=False)
    word = next((word for word in STOCK if word in whose), None)
    for cfg in STOCK.get(word or '', ()):
        with DefaultScope.overwrite_default_scope('mmdet'):
            module = MODELS.build(cfg)
        try:
            return module, *convert_state_dict(state, module)
        except CheckpointError:
            continue
    raise CheckpointError(
        f'the weights{" of " * bool(whose)}{whose} fit no stock module '
        f'that is known ({", ".join(STOCK)}). Name the config whose backbone '
        'takes them by --to CONFIG.'
    )


def _write(out: Path, converted: State, module: nn.Module) -> None:
    """Write a checkpoint that the module takes, as MMEngine loads it."""
    # MMDetection's Swin reads nothing else than the backbone of a detector.
    swin = hasattr(module, 'convert_weights')
    state = OrderedDict(
        ('backbone.' * swin + key, value.contiguous())
        for key, value in converted.items()
    )

    def write(path: str) -> None:
        torch.save(dict(state_dict=state), path)
        _check(path, converted, module)

    write_atomically(str(out), write)


def _check(path: str, converted: Mapping[str, Any], module: Any) -> None:
    module.init_cfg = ConfigDict(type='Pretrained', checkpoint=path)
    module.convert_weights = False
    with hushed(), safe_checkpoints(), torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
        module._is_init = False
        module.init_weights()
    own = module.state_dict()
    wrong = [k for k, v in converted.items() if not own[k].equal(v.to(own[k]))]
    if wrong:
        raise CheckpointError(
            f'{len(wrong)} of {len(converted)} tensors are not in '
            f'{type(module).__name__} after loading ({wrong[0]}); nothing was '
            'written.'
        )
