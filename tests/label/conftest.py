"""Detectors and images that are cheap to label."""

import cv2
import numpy as np
import pytest

from mmkd.label.command import main
from tests.helpers import onnx_files

VALUES = (60, 120, 180, 240)
"""The brightness of the images; a box and its score depend on it."""


@pytest.fixture
def folder(tmp_path):
    """Four images in two folders, and what is none."""
    root = tmp_path / 'images'
    for number, value in enumerate(VALUES):
        path = root / f'part_{number % 2}' / f'{number}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((64, 64, 3), value, np.uint8))
    (root / 'readme.txt').write_text('photos')
    return root


@pytest.fixture
def label(tmp_path):
    """Label with a file of :func:`tests.helpers.onnx_files.brightness`."""
    file = onnx_files.brightness(tmp_path / 'thing.onnx')
    out = tmp_path / 'labels.json'

    def label(source, *options, classes='[thing]'):
        main(
            [
                *(str(source), '--teacher', file, '--out', str(out)),
                *map(str, options),
                *('--teacher-options', f'classes={classes}'),
            ]
        )
        return out

    return label


@pytest.fixture
def video(tmp_path):
    path = tmp_path / 'video.avi'
    codec = cv2.VideoWriter_fourcc(*'MJPG')
    writer = cv2.VideoWriter(str(path), codec, 5, (64, 64))
    for value in range(40, 240, 20):
        writer.write(np.full((64, 64, 3), value, np.uint8))
    writer.release()
    return path
