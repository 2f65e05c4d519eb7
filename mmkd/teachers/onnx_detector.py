"""A teacher that is an ONNX file, run by onnxruntime."""

import ast
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmkd.data.files import path_hint, wrong_path
from mmkd.errors import ConfigError, PackageError

from .detections import WHERE, Found, check_choices
from .disk_cache import fast_hash
from .foreign import ForeignDetector
from .functions import source_hash
from .onnx_decoders import Decoder, Setting, chosen, find_decoder
from .onnx_inputs import DTYPES, Frame, Preprocessing
from .view import TeacherContext

PROVIDERS = {'cpu': 'CPUExecutionProvider', 'cuda': 'CUDAExecutionProvider'}
AT_ONCE = 16
"""As many images are run together where the file takes any number."""


class OnnxDetector(ForeignDetector):
    """A detector in an ONNX file, of whatever framework.

    The defaults of ``resize``, ``mean``, ``std``, ``to_rgb`` and
    ``pad_value`` are those of YOLO's exports. A file that ``mmkd export`` has
    written says itself what it needs, and takes none of them.

    Args:
        file: The ONNX file.
        classes: The names of its classes, as in
            :class:`~mmkd.teachers.detections.DetectionsTeacher`. None for a
            file that names them: one of ``mmkd export`` or Ultralytics.
        decoder: What reads its outputs: ``'mmdeploy'``, ``'yolo'``,
            ``'yolov5'``, ``'end_to_end'``, ``'detr'``, ``'nanodet'``,
            ``'mmkd'``, or ``'auto'`` for the one that fits them. A function
            of your own, ``'module:function'``, gets the outputs of one image
            by name, as arrays without a batch's dimension, and a
            :class:`~mmkd.teachers.onnx_decoders.Setting`; it returns
            :class:`~mmkd.teachers.onnx_decoders.Candidates`.
        size: Height and width of the input, or one number for both, if the
            file leaves them open.
        resize: ``'letterbox'``, ``'fit'`` or ``'stretch'``; see
            :class:`~mmkd.teachers.onnx_inputs.Preprocessing`.
        mean: What is subtracted from each channel, in the input's order.
        std: What each channel is divided by after that. A file that takes
            bytes gets the pixels as they are.
        to_rgb: Whether the input is RGB; else BGR.
        pad_value: The value of padding before normalisation.
        score_thr: Boxes of a lower score are left out.
        nms_iou: The IoU of the suppression for outputs without one.
        max_per_image: At most so many boxes are taken from an image.
        device: ``'cpu'`` or ``'cuda'``; by default that of the student.
        context: What the teacher is told about the training.
        **options: As in :class:`~mmkd.teachers.foreign.ForeignDetector`.

    Raises:
        ConfigError: If an option is wrong, the file is no detector that a
            decoder can read, or the device is missing.
        PackageError: If onnxruntime is not installed.
    """

    def __init__(
        self,
        *,
        file: str,
        context: TeacherContext,
        classes: Sequence[str] | str | None = None,
        decoder: str = 'auto',
        size: int | Sequence[int] | None = None,
        resize: str = 'letterbox',
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (255.0, 255.0, 255.0),
        to_rgb: bool = True,
        pad_value: float = 114,
        score_thr: float = 0.05,
        nms_iou: float = 0.65,
        max_per_image: int = 100,
        device: str | None = None,
        **options: Any,
    ) -> None:
        check_choices(max_per_image, score_thr=score_thr, nms_iou=nms_iou)
        self.session = open_session(file, device or context.device.type)
        about = _metadata(self.session)
        if classes is None:
            classes = _named_classes(about, file)
        super().__init__(classes, context=context, **options)
        self.file = file
        self._own = 'mmkd' in about
        if self._own:
            size = about['height'], about['width']
            resize = 'fit' if about['keep_ratio'] else 'stretch'
            mean, std, pad_value = (0.0,) * 3, (1.0,) * 3, 0
            to_rgb, decoder = False, 'mmkd'
        elif self.session.get_inputs()[0].type == 'tensor(uint8)':
            mean, std = (0.0,) * 3, (1.0,) * 3
        self._shape = _input_shape(self.session, file, self._own)
        self._preprocess = Preprocessing(
            _size(self._shape, size, file),
            resize=resize,
            mean=mean,
            std=std,
            to_rgb=to_rgb,
            pad_value=pad_value,
        )
        self._setting = Setting(len(self.classes), self._preprocess.size)
        self._decoder = self._find_decoder(decoder)
        self._choice: dict[str, Any] = dict(
            score_thr=score_thr,
            nms_iou=nms_iou if self._decoder.suppress else None,
            max_per_image=max_per_image,
        )
        reader = source_hash(decoder) if ':' in decoder else ''
        self.identify(
            *(_content_hash(file), self._preprocess),
            *(decoder, reader, self._choice),
        )

    def detect(
        self, images: Sequence[np.ndarray], names: Sequence[str]
    ) -> list[Found | None]:
        found: list[Found | None] = []
        most = self._shape[0] or AT_ONCE
        for start in range(0, len(images), most):
            part = images[start : start + most]
            fitted = [self._preprocess(image) for image in part]
            sizes = [
                frame.size_of(image)
                for image, (_, frame) in zip(part, fitted, strict=True)
            ]
            outputs = self._run([pixels for pixels, _ in fitted], sizes)
            found += [
                self._read(values, frame, image.shape)
                for values, (_, frame), image in zip(
                    outputs, fitted, part, strict=True
                )
            ]
        return found

    def describe(self) -> str:
        return f'{super().describe()}, read from {self.file}'

    def _read(
        self, outputs: Mapping[str, Any], frame: Frame, shape: Sequence[int]
    ) -> Found:
        candidates = self._decoder.read(outputs, self._setting)
        found = chosen(candidates, **self._choice)
        wrong = ~np.isfinite(found.boxes).all(1)
        wrong |= (found.labels < 0) | (found.labels >= len(self.classes))
        if wrong.any():
            raise ConfigError(
                f'{WHERE}: {self.file} gives boxes that are not finite, or '
                f'labels outside the {len(self.classes)} classes, such as '
                f'label {found.labels[wrong][0]}. Check `classes` and '
                '`decoder`.'
            )
        sides = np.array([shape[1], shape[0]] * 2, np.float32)
        boxes = np.clip(frame.back(found.boxes), 0, sides)
        return found._replace(boxes=boxes.astype(np.float32))

    def _run(
        self, pixels: Sequence[np.ndarray], sizes: Sequence[Any]
    ) -> list[dict[str, np.ndarray]]:
        """Run the file; return the outputs of each image by name.

        Args:
            pixels: The inputs of the images, each (3, H, W).
            sizes: Height and width of each picture within its input.
        """
        if self._own:
            return [
                self._outputs(
                    image=each.transpose(1, 2, 0).astype(np.uint8),
                    size=np.array(size, np.int64),
                )
                for each, size in zip(pixels, sizes, strict=True)
            ]
        given = self.session.get_inputs()[0]
        batch = np.stack(pixels).astype(DTYPES[given.type])
        count = len(batch)
        if (fixed := self._shape[0]) is not None and count < fixed:
            blank = np.zeros((fixed - count, *batch.shape[1:]), batch.dtype)
            batch = np.concatenate([batch, blank])
        outputs = self._outputs(**{given.name: batch})
        for name, value in outputs.items():
            if value.ndim == 0 or len(value) != len(batch):
                raise ConfigError(
                    f'{WHERE}: {self.file} answers {len(batch)} images with '
                    f'the output {name} of shape {value.shape}, which does '
                    'not tell them apart. Export it for one image, or wrap '
                    'it in a function (type="mmkd.PythonDetector").'
                )
        return [
            {name: value[row] for name, value in outputs.items()}
            for row in range(count)
        ]

    def _outputs(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        names = [output.name for output in self.session.get_outputs()]
        try:
            values = self.session.run(None, inputs)
        except Exception as error:  # onnxruntime's have no common class
            raise ConfigError(
                f'{WHERE}: onnxruntime cannot run {self.file}: '
                f'{_first_line(error)} Check `size`, and that the file takes '
                'images alone.'
            ) from error
        return dict(zip(names, values, strict=True))

    def _find_decoder(self, name: str) -> Decoder:
        """Find what reads the outputs, by those of a grey image."""
        height, width = self._preprocess.size
        grey = np.full((height, width, 3), 114, np.uint8)
        pixels, _ = self._preprocess(grey)
        if self._own:
            return find_decoder(name, {}, self._setting, self.file)
        batch = self._run([pixels], [])
        shapes = {name: value.shape for name, value in batch[0].items()}
        return find_decoder(name, shapes, self._setting, self.file)


# ------------------------------------------------------------------- the file


def open_session(file: str, device: str) -> Any:
    """Open an ONNX file.

    Args:
        file: The file.
        device: ``'cpu'`` or ``'cuda'``.

    Raises:
        ConfigError: If it cannot be read, or the device is missing.
        PackageError: If onnxruntime is not installed.
    """
    if not Path(file).is_file():
        raise ConfigError(
            f'{WHERE}.file: {file} {wrong_path(file)}. {path_hint(file)}Give '
            'the path of an ONNX file.'
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise PackageError(
            "mmkd.OnnxDetector needs onnxruntime: pip install 'mmkd[onnx]'"
        ) from error
    if device not in PROVIDERS:
        raise ConfigError(
            f'{WHERE}.device must be one of {", ".join(PROVIDERS)}, got '
            f'{device!r}.'
        )
    known = onnxruntime.get_available_providers()
    if PROVIDERS[device] not in known:
        raise ConfigError(
            f'{WHERE}: device={device!r} needs the {PROVIDERS[device]}, and '
            f'this onnxruntime has {", ".join(known)}. Install '
            "onnxruntime-gpu, or set device='cpu'."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    providers = list(dict.fromkeys([PROVIDERS[device], PROVIDERS['cpu']]))
    try:
        session = onnxruntime.InferenceSession(file, options, providers)
    except Exception as error:  # onnxruntime's have no common class
        raise ConfigError(
            f'{WHERE}.file: onnxruntime cannot open {file}: '
            f'{_first_line(error)} Export it again.'
        ) from error
    if session.get_providers()[0] != PROVIDERS[device]:
        raise ConfigError(
            f'{WHERE}: onnxruntime has the {PROVIDERS[device]} and cannot '
            "start it; see what it has printed. Mend it, or set device='cpu'."
        )
    return session


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition('\n')[0]
    return f'"{text[:200]}".'


def _metadata(session: Any) -> dict[str, Any]:
    """Return what an exporter has written into a file, as values."""
    about: dict[str, Any] = {}
    for key, text in session.get_modelmeta().custom_metadata_map.items():
        about[key] = text
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError):
                about[key] = parse(text)
                break
    return about


def _named_classes(about: Mapping[str, Any], file: str) -> tuple[str, ...]:
    names = about.get('classes', about.get('names'))
    if isinstance(names, Mapping):
        names = [names[key] for key in sorted(names)]
    if not isinstance(names, list) or not names:
        raise ConfigError(
            f'{WHERE}: {file} does not name its classes. Give their names in '
            'the order of its labels, or a known list: classes="coco".'
        )
    return tuple(map(str, names))


def _input_shape(
    session: Any, file: str, own: bool
) -> tuple[int | None, int | None, int | None]:
    """Return batch, height and width of the input; None for an open one."""
    inputs = session.get_inputs()
    if own:
        return 1, inputs[0].shape[0], inputs[0].shape[1]
    shape = inputs[0].shape
    fits = len(inputs) == 1 and len(shape) == 4 and inputs[0].type in DTYPES
    if not fits or (isinstance(shape[1], int) and shape[1] != 3):
        given = ', '.join(f'{i.name} {i.shape} {i.type}' for i in inputs)
        raise ConfigError(
            f'{WHERE}: {file} takes {given}; expected a single input of '
            'images, (B, 3, H, W), of floats or uint8. Export it so, or wrap '
            'it in a function (type="mmkd.PythonDetector").'
        )
    batch, _, height, width = (
        side if isinstance(side, int) and side > 0 else None for side in shape
    )
    return batch, height, width


def _size(
    shape: Sequence[int | None], given: Any, file: str
) -> tuple[int, int]:
    """Return height and width of the input, of the file or as given."""
    sides = (given, given) if isinstance(given, int) else given
    if sides is not None and not (
        isinstance(sides, list | tuple)
        and len(sides) == 2
        and all(type(side) is int and side > 0 for side in sides)
    ):
        raise ConfigError(
            f'{WHERE}.size must be a height and a width in pixels, got '
            f'{given!r}.'
        )
    found = []
    for fixed, side in zip(shape[1:], sides or (None, None), strict=True):
        if fixed is None and side is None:
            raise ConfigError(
                f'{WHERE}: {file} leaves the size of its images open. Give '
                'the one that it was trained for: size=(H, W).'
            )
        if None not in (fixed, side) and fixed != side:
            raise ConfigError(
                f'{WHERE}.size is {given!r}, and {file} takes images of '
                f'{shape[1]} x {shape[2]} (H x W). Leave it out.'
            )
        found.append(fixed or side)
    return found[0], found[1]


def _content_hash(file: str) -> str:
    """Hash a file, and the weights that it may keep in one beside it."""
    digest = fast_hash(Path(file).read_bytes())
    for beside in sorted(Path(file).parent.glob(f'{Path(file).name}*data')):
        digest.update(beside.read_bytes())
    return digest.hexdigest()
