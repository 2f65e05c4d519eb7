"""Export a detector to ONNX, and check the file with onnxruntime.

    python docs/examples/export_onnx.py CONFIG CHECKPOINT student.onnx

The graph takes normalised, padded images (B, 3, H, W) and returns what the
head of a one-stage detector returns, level by level. Decoding and NMS stay in
Python; a deployment tool such as MMDeploy exports them as well.
"""

import argparse
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from mmdet.apis import init_detector
from torch import Tensor, nn

TOLERANCE = 1e-3


class Raw(nn.Module):
    """A detector as a function from images to a flat tuple of maps."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        levels = self.detector(images, mode='tensor')
        return tuple(map_ for kind in levels for map_ in kind)


def export(
    config: str, checkpoint: str, path: Path, size: tuple[int, int]
) -> float:
    """Write the graph; return how far onnxruntime is from PyTorch."""
    # Nothing here knows of mmkd: a distilled checkpoint is a stock one.
    detector = init_detector(config, checkpoint, 'random', device='cpu')
    model = Raw(detector).eval()
    images = torch.rand(1, 3, *size)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of tracing, and of the exporter
        expected = model(images)
        torch.onnx.export(
            model,
            (images,),
            path,
            dynamo=False,
            opset_version=17,
            input_names=['images'],
            dynamic_axes={'images': {0: 'batch'}},
        )
    session = onnxruntime.InferenceSession(path)
    found = session.run(None, {'images': images.numpy()})
    return max(
        float(np.abs(theirs - ours.numpy()).max())
        for theirs, ours in zip(found, expected, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('path', type=Path)
    parser.add_argument('--size', type=int, nargs=2, default=(800, 1344))
    args = parser.parse_args()
    error = export(args.config, args.checkpoint, args.path, args.size)
    print(f'{args.path}: onnxruntime differs by at most {error:.1e}')
    if error > TOLERANCE:
        raise SystemExit('that is too much: the export is not the detector.')


if __name__ == '__main__':
    main()
