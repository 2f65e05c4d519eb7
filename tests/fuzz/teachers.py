"""Files that teach: detections, and detectors in ONNX."""

import math
import tempfile
from pathlib import Path

import numpy as np

from mmkd.teachers.detections_file import DetectionsFile
from mmkd.teachers.onnx_detector import OnnxDetector
from mmkd.teachers.view import TeacherContext
from tests.helpers import onnx_files

ALONE = TeacherContext(None, ())
"""No student: the classes are the teacher's own."""
SHAPE = (48, 64)


def check(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> None:
    assert len(boxes) == len(scores) == len(labels)
    assert np.isfinite(boxes).all()
    assert ((scores >= 0) & (scores <= 1)).all()


def read_detections(folder: Path, name: str = 'x.json') -> None:
    teacher = DetectionsFile(
        file=str(folder / name), context=ALONE, score_thr=0.0
    )
    for image in teacher._images.values():
        found = teacher._found(image.name or '', None)
        check(*found)
        assert all(0 <= label < len(teacher.classes) for label in found.labels)


def onnx_detector() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = onnx_files.brightness(Path(folder, 'x.onnx'), (1, 3, *SHAPE))
        return Path(path).read_bytes()


def read_onnx(folder: Path) -> None:
    teacher = OnnxDetector(
        file=str(folder / 'x.onnx'),
        context=ALONE,
        classes=['light'],
        decoder='yolo',
        resize='stretch',
    )
    image = np.full((*SHAPE, 3), 128, np.uint8)
    (found,) = teacher.detect([image], ['x'])
    assert found is not None
    check(*found)
    assert all(math.isfinite(value) for value in found.boxes.ravel())
