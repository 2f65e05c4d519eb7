"""Detect in a photo with what `mmkd export` has written.

python detect_onnx.py student.onnx photo.jpg
"""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime


def detect(model, photo):
    about = json.loads(Path(f'{model}.json').read_text())
    session = onnxruntime.InferenceSession(model)
    shape = about['height'], about['width']
    scale = np.divide(shape, photo.shape[:2])
    if about['keep_ratio']:
        scale[:] = scale.min()
    size = np.rint(photo.shape[:2] * scale).astype(np.int64)
    image = np.zeros((*shape, 3), np.uint8)
    image[: size[0], : size[1]] = cv2.resize(photo, size[::-1].tolist())
    boxes, scores, labels = session.run(None, {'image': image, 'size': size})
    boxes /= scale[[1, 0, 1, 0]].astype(np.float32)  # in pixels of the photo
    return boxes, scores, [about['classes'][label] for label in labels]


if __name__ == '__main__':
    found = detect(sys.argv[1], cv2.imread(sys.argv[2]))
    for box, score, name in zip(*found, strict=True):
        if score > 0.3:
            print(f'{name} {score:.2f}', *np.round(box))
