"""Does an exported graph find what the detector finds, and how fast?"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from mmkd.data.drawn import draw
from mmkd.data.layouts.listing import IMAGES, is_image
from mmkd.data.pictures import too_large
from mmkd.detectors.blank import whole_image
from mmkd.detectors.graph import INPUTS, REMEDY, first_line
from mmkd.detectors.pixels import pad_value
from mmkd.errors import DataError, ExportError

from .canvas import Canvas, test_dataset

PIXELS, SCORE = 1.0, 0.01
"""Boxes that are nearer than this, of scores that are, are the same."""
LONE = 0.02
"""The share of boxes that only one may find: rounding decides on few."""

Found = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Boxes (N, 4), xyxy in pixels, scores (N) and labels (N)."""


@dataclass
class Check:
    """What PyTorch and onnxruntime have found on the same images."""

    pixels: float = 0.0
    """The largest difference of a coordinate, among boxes that both find."""
    score: float = 0.0
    boxes: int = 0
    only_torch: int = 0
    only_onnx: int = 0
    torch_ms: list[float] = field(default_factory=list)
    onnx_ms: list[float] = field(default_factory=list)

    @property
    def same(self) -> bool:
        both = 2 * self.boxes - self.only_torch + self.only_onnx
        return self.only_torch + self.only_onnx <= LONE * both

    def add(self, ours: Found, theirs: Found) -> None:
        """Count boxes of the same image as the same or as lone ones."""
        pairs = list(pair_up(ours, theirs))
        for i, j in pairs:
            apart = np.abs(ours[0][i] - theirs[0][j]).max()
            self.pixels = max(self.pixels, float(apart))
            self.score = max(self.score, float(abs(ours[1][i] - theirs[1][j])))
        self.boxes += len(ours[0])
        self.only_torch += len(ours[0]) - len(pairs)
        self.only_onnx += len(theirs[0]) - len(pairs)

    def text(self, threads: int) -> str:
        ours, theirs = map(statistics.median, (self.torch_ms, self.onnx_ms))
        return (
            f'  {self.boxes} boxes; largest difference {self.pixels:.2g} px '
            f'and {self.score:.1g} in score\n'
            f'  only PyTorch has {self.only_torch}, only onnxruntime '
            f'{self.only_onnx}\n'
            f'  PyTorch {ours:.1f} ms, onnxruntime {theirs:.1f} ms per image '
            f'(median, CPU, threads: {threads})'
        )


def check(
    model: Any, graph: bytes, canvas: Canvas, pictures: Sequence[np.ndarray]
) -> Check:
    """Run both on pictures, each picture by one after the other."""
    session = start(graph)
    # nothing may be found in it, which must be no error
    run(session, *canvas.fit(np.zeros((9, 9, 3), np.uint8)))
    result = Check()
    for picture in pictures:
        image, size = canvas.fit(picture)
        start_ = time.perf_counter()
        ours = detect(model, image, size, canvas)
        between = time.perf_counter()
        theirs = run(session, image, size)
        end = time.perf_counter()
        result.add(ours, theirs)
        result.torch_ms.append(1000 * (between - start_))
        result.onnx_ms.append(1000 * (end - between))
    return result


def start(graph: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(
        graph, options, providers=['CPUExecutionProvider']
    )


def run(session: Any, image: np.ndarray, size: np.ndarray) -> Found:
    given = dict(zip(INPUTS, (image, size), strict=True))
    try:
        boxes, scores, labels = session.run(None, given)
    except Exception as error:  # onnxruntime's have no common class
        raise ExportError(
            f'onnxruntime cannot run the graph: {first_line(error)} {REMEDY}'
        ) from error
    return boxes, scores, labels


@torch.inference_mode()
def detect(
    model: Any, image: np.ndarray, size: np.ndarray, canvas: Canvas
) -> Found:
    """Detect with MMDetection's own preprocessing, padded to the canvas."""
    height, width = map(int, size)
    if canvas.padding is None:
        image = image[:height, :width]
    else:
        image = image.copy()
        image[height:] = image[:, width:] = canvas.padding
    sample = whole_image((image.shape[0], image.shape[1]))
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    data = model.data_preprocessor(
        dict(inputs=[pixels], data_samples=[sample])
    )
    inputs = data['inputs']
    blank = [
        side - given
        for side, given in zip(canvas.shape, inputs.shape[2:], strict=True)
    ]
    inputs = F.pad(
        inputs,
        (0, blank[1], 0, blank[0]),
        value=pad_value(model.data_preprocessor),
    )
    sample.set_metainfo(
        dict(batch_input_shape=canvas.shape, pad_shape=canvas.shape)
    )
    found = model.predict(inputs, [sample], rescale=False)[0].pred_instances
    boxes, scores, labels = (
        found[key].numpy() for key in ('bboxes', 'scores', 'labels')
    )
    return boxes, scores, labels


def pair_up(ours: Found, theirs: Found) -> Iterator[tuple[int, int]]:
    """Pair each box with the nearest that is the same and still free."""
    apart = np.abs(ours[0][:, None] - theirs[0]).max(-1, initial=0)
    near = (
        (apart <= PIXELS)
        & (np.abs(ours[1][:, None] - theirs[1]) <= SCORE)
        & (ours[2][:, None] == theirs[2])
    )
    apart[~near] = np.inf
    for i in range(len(apart)):
        if np.isfinite(apart[i]).any():
            j = int(apart[i].argmin())
            apart[:, j] = np.inf
            yield i, j


# ------------------------------------------------------------------ pictures


def pictures_for(
    config: Mapping[str, Any], folder: Path | None, number: int
) -> tuple[list[np.ndarray], str]:
    """Return pictures to check on, and where they come from.

    They are those of the folder, or of the data set of the config's test
    without its annotations, or else drawn ones.

    Raises:
        DataError: If the given folder has none.
    """
    places = [folder] if folder else image_folders(test_dataset(config))
    for place in places:
        pictures = read_spread(place, number)
        if pictures:
            return pictures, f'of {place}'
    if folder:
        raise DataError(
            f'--images: {folder} has no picture that can be read (expected '
            f'{", ".join(sorted(IMAGES))}). Give a folder of photos.'
        )
    random = np.random.default_rng(0)
    drawn = [draw(key, random)[0] for key in range(number)]
    return drawn, (
        'that are drawn, because those of the config are not here (--images '
        'FOLDER takes others)'
    )


def image_folders(dataset: Mapping[str, Any]) -> list[Path]:
    """Where the images of a data set may lie."""
    root = Path(dataset.get('data_root') or '')
    prefix = dataset.get('data_prefix') or {}
    values = prefix.values() if isinstance(prefix, Mapping) else [prefix]
    named = [root / str(value) for value in values if value]
    return [place for place in named or [root] if place != Path()]


def read_spread(folder: Path, number: int) -> list[np.ndarray]:
    """Read pictures of a folder, from its first to its last."""
    paths = sorted(path for path in folder.rglob('*') if is_image(path.name))
    step = max(len(paths) // number, 1)
    order = [*paths[::step], *paths]  # where some cannot be read
    readable = (
        picture
        for path in dict.fromkeys(order)
        if not too_large(path)
        and (picture := cv2.imread(str(path))) is not None
    )
    return list(islice(readable, number))
