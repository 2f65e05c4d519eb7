"""A teacher that is a Python function."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from mmengine.logging import print_log
from torch import Tensor

from mmkd.errors import ConfigError

from .detections import WHERE, Found, check_choices
from .foreign import ForeignDetector
from .functions import find_function, source_hash
from .onnx_decoders import Candidates, chosen
from .view import TeacherContext

ON_ERROR = ('stop', 'skip')
KEYS = (
    ('boxes', 'xyxy', 'bboxes'),
    ('scores', 'confidence'),
    ('labels', 'class_id'),
)
"""What an answer has, and what it may be called there."""
NAMED = 10
"""So many images are named on which a function has failed."""


class PythonDetector(ForeignDetector):
    """A detector that is a function of an image, of whatever framework.

    The function gets an image (H, W, 3), uint8, RGB, and returns its boxes
    (N, 4), xyxy in pixels of the image, scores (N,) and labels (N,): as a dict
    with these keys, or as an object with ``xyxy``, ``confidence`` and
    ``class_id``, such as ``supervision.Detections``. Arrays, tensors and lists
    will do. Labels are numbers in ``classes``, or names of them.

    Args:
        function: ``'module:function'``; its model is best loaded once, when
            the module is imported.
        classes: The names of its classes, as in
            :class:`~mmkd.teachers.detections.DetectionsTeacher`.
        batched: Whether the function takes a list of images, and returns a
            list of answers.
        score_thr: Boxes of a lower score are left out.
        max_per_image: At most so many boxes are taken from an image, those of
            the highest scores.
        on_error: ``'stop'`` ends the training if the function fails on an
            image. With ``'skip'`` the image has no detections in this step,
            and the log names it.
        version: Anything that changes when the function would answer
            otherwise, such as the name of its weights. With the text of its
            module it tells apart what the cache keeps.
        context: What the teacher is told about the training.
        **options: As in :class:`~mmkd.teachers.foreign.ForeignDetector`.

    Raises:
        ConfigError: If an option is wrong, there is no such function, or it
            returns something else.
    """

    def __init__(
        self,
        *,
        function: str,
        classes: Sequence[str] | str,
        context: TeacherContext,
        batched: bool = False,
        score_thr: float = 0.05,
        max_per_image: int = 100,
        on_error: str = 'stop',
        version: Any = '',
        **options: Any,
    ) -> None:
        check_choices(max_per_image, score_thr=score_thr)
        if on_error not in ON_ERROR:
            raise ConfigError(
                f"{WHERE}.on_error must be one of 'stop', 'skip', got "
                f'{on_error!r}.'
            )
        if not isinstance(function, str) or ':' not in function:
            raise ConfigError(
                f'{WHERE}.function must be "module:function", got '
                f'{function!r}.'
            )
        super().__init__(classes, context=context, **options)
        self.name, self.batched = function, batched
        self.score_thr, self.max_per_image = score_thr, max_per_image
        self.on_error = on_error
        self.skipped = 0
        """On how many images the function has failed."""
        self._call = find_function(function, f'{WHERE}.function')
        self._labels = {name: i for i, name in enumerate(self.classes)}
        self.identify(
            function, source_hash(function), version, score_thr, max_per_image
        )

    def detect(
        self, images: Sequence[np.ndarray], names: Sequence[str]
    ) -> list[Found | None]:
        if self.batched:
            try:
                return self._read_batch(self._call(list(images)), names)
            except ConfigError:
                raise
            except Exception as error:  # of any function, for any reason
                if len(images) == 1:
                    self._note_failure(names[0], error)
                    return [None]
                # One by one, to find the image that it fails on.
                pairs = zip(images, names, strict=True)
                return [self.detect([i], [n])[0] for i, n in pairs]
        return [
            self._detect_one(image, name)
            for image, name in zip(images, names, strict=True)
        ]

    def _detect_one(self, image: np.ndarray, name: str) -> Found | None:
        try:
            answer = self._call(image)
        except Exception as error:  # of any function, for any reason
            self._note_failure(name, error)
            return None
        return self._read(answer, name)

    def _note_failure(self, name: str, error: Exception) -> None:
        """Stop, or say on which image the function has failed, and go on."""
        text = f'{self.name} fails on {name}: {type(error).__name__}: {error}'
        if self.on_error == 'stop':
            raise ConfigError(
                f'{WHERE}: {text}. Mend the function or the image, or set '
                'on_error="skip" to go on without detections of it.'
            ) from error
        self.skipped += 1
        if self.skipped <= NAMED:
            print_log(
                f'{text}. It goes on without detections of this image.',
                'current',
                logging.WARNING,
            )

    def _read_batch(
        self, answers: Any, names: Sequence[str]
    ) -> list[Found | None]:
        if not isinstance(answers, list | tuple) or len(answers) != len(names):
            got = type(answers).__name__
            if isinstance(answers, list | tuple):
                got = f'{got} of {len(answers)}'
            raise ConfigError(
                f'{WHERE}: {self.name} must return a list with an answer for '
                f'each of {len(names)} images, got a {got}. Set batched=False '
                'if it takes one image.'
            )
        pairs = zip(answers, names, strict=True)
        return [self._read(answer, name) for answer, name in pairs]

    def _read(self, answer: Any, name: str) -> Found:
        """Read the answer for an image.

        Raises:
            ConfigError: If it is none.
        """
        fail = functools.partial(self._refusal, name)
        boxes, scores, labels = (_part(answer, keys, fail) for keys in KEYS)
        if labels.dtype.kind in 'US':
            labels = np.array([self._label(each, fail) for each in labels])
        boxes = _numbers(boxes, fail).reshape(-1, 4)
        scores, labels = (_numbers(v, fail).ravel() for v in (scores, labels))
        if not len(boxes) == len(scores) == len(labels):
            raise fail(
                f'{len(boxes)} boxes, {len(scores)} scores and {len(labels)} '
                'labels'
            )
        if not all(np.isfinite(v).all() for v in (boxes, scores, labels)):
            raise fail('numbers that are not finite')
        if len(scores) and not 0 <= scores.min() <= scores.max() <= 1:
            raise fail(f'scores from {scores.min():.4g} to {scores.max():.4g}')
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(
            self.classes
        ):
            raise fail(
                f'labels from {labels.min():.0f} to {labels.max():.0f} for '
                f'{len(self.classes)} classes'
            )
        candidates = Candidates(boxes, scores, labels)
        return chosen(
            candidates,
            score_thr=self.score_thr,
            nms_iou=None,
            max_per_image=self.max_per_image,
        )

    def _label(self, name: str, fail: Callable[[str], ConfigError]) -> int:
        if name not in self._labels:
            raise fail(f'the label {str(name)!r}, which is none of `classes`')
        return self._labels[name]

    def _refusal(self, name: str, got: str) -> ConfigError:
        return ConfigError(
            f'{WHERE}: {self.name} must return boxes (N, 4), xyxy in pixels, '
            'scores (N,) from 0 to 1 and labels (N,), as a dict or as '
            f'supervision.Detections; for {name} it returns {got}.'
        )


def _part(
    answer: Any,
    names: Sequence[str],
    fail: Callable[[str], ConfigError],
) -> np.ndarray:
    """Return a part of an answer, which may have several names."""
    for name in names:
        if isinstance(answer, Mapping):
            value = answer.get(name)
        else:
            value = getattr(answer, name, None)
        if value is not None:
            if isinstance(value, Tensor):
                value = value.detach().cpu().numpy()
            return np.asarray(value)
    kind = type(answer).__name__
    if isinstance(answer, Mapping):
        kind = f'a dict with {", ".join(map(str, answer)) or "no key"}'
    raise fail(f'{kind}, without {" or ".join(names)}')


def _numbers(
    values: np.ndarray, fail: Callable[[str], ConfigError]
) -> np.ndarray:
    if values.dtype.kind not in 'biuf':
        raise fail(f'values of the type {values.dtype}')
    return values.astype(np.float64)
