"""Report errors in the data before training, in terms of the user's files.

MMDetection raises a bare ``FileNotFoundError`` for a missing folder, a
``JSONDecodeError`` for a truncated annotation file, and fails hours later in
a worker for a missing image. The checks here find all of them when the data
sets are built.
"""

import functools
import os
import os.path as osp
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from json import JSONDecodeError
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

import cv2
import mmcv
import numpy as np
from mmengine.config import Config
from torch.utils.data import Dataset

from mmkd.data import check_coco_annotations, voc_check
from mmkd.data.class_names import named_classes, parts
from mmkd.data.coco import read_categories
from mmkd.data.datasets import wrapped
from mmkd.data.errors import some
from mmkd.data.pictures import is_limited, too_large
from mmkd.detectors.source import class_names
from mmkd.errors import DataError, MMKDError, PictureError

DATA_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AssertionError,
    ParseError,
)
PREPARED = {
    'coco': 'coco',
    'VOCdevkit': 'voc',
    'bccd': 'bccd',
    'neon': 'neon',
}
"""Folder to the data set of ``mmkd prepare`` that makes it."""
EMPTY = (
    'the data set is empty: expected at least one image, got none after '
    'filter_cfg (which drops images without objects). Check the classes in '
    'metainfo and the annotation file.'
)


NAMED = 20
"""As many classes are named in a message."""


@contextmanager
def explain_data_error(cfg: Config, split: str) -> Iterator[None]:
    """Explain an error that occurs while a split's loop is built.

    Args:
        cfg: The config with ``<split>_dataloader`` and ``<split>_evaluator``.
        split: ``'train'``, ``'val'`` or ``'test'``.

    Raises:
        DataError: If the data is missing or malformed. The message says which
            file, what was expected and found, and which command prepares it.
            Any other error passes unchanged.
    """
    try:
        yield
    except DataError:
        raise
    except DATA_ERRORS as error:
        dataset = (cfg.get(f'{split}_dataloader') or {}).get('dataset')
        evaluators = cfg.get(f'{split}_evaluator') or []
        if not isinstance(evaluators, list | tuple):
            evaluators = [evaluators]
        try:
            if isinstance(dataset, Mapping):
                diagnose(dataset)
            for evaluator in evaluators:
                path = evaluator.get('ann_file')
                if path:
                    check_annotations(path)
        except DataError as diagnosis:
            raise diagnosis from error
        if 'need at least one array' in str(error):  # MMEngine's words
            raise DataError(EMPTY + _class_lists(dataset)) from error
        if isinstance(error, JSONDecodeError | UnicodeDecodeError):
            raise DataError(
                f'the annotations of {split}_dataloader or {split}_evaluator '
                f'cannot be read as UTF-8: {error}. Save the files as UTF-8, '
                'without a byte order mark.'
            ) from error
        raise


def _class_lists(dataset: Any) -> str:
    """Name both sides' classes where a data set's config matches no file."""
    if not isinstance(dataset, Mapping):
        return ''
    if inner := wrapped(dataset):
        return ''.join(_class_lists(each) for each in inner)
    config = Config(dict(model={}, train_dataloader=dict(dataset=dataset)))
    root, path = dataset.get('data_root') or '', dataset.get('ann_file') or ''
    return _lists(class_names({}, config), osp.join(root, path))


def _lists(names: Sequence[str] | None, path: object) -> str:
    """Name the classes of a data set and of its file if none is in both."""
    rows = read_categories(path) if isinstance(path, str) else None
    found = [row['name'] for row in rows or ()]
    if not names or not found or {*names} & {*found}:
        return ''
    return (
        f' The config names the classes {some(names, NAMED)}; {path} names '
        f'{some(found, NAMED)}.'
    )


def diagnose(dataset: Mapping[str, Any]) -> None:
    """Check the files that a data set's config names, and those it wraps.

    Args:
        dataset: The config of the data set.

    Raises:
        DataError: At the first problem.
    """
    for inner in wrapped(dataset):
        diagnose(inner)
    annotations = dataset.get('ann_file')
    if not annotations:
        return
    prefix = dataset.get('data_prefix') or {}
    root = dataset.get('data_root') or ''
    voc = prefix.get('sub_data_root')
    check_annotations(
        osp.join(root, annotations),
        images=osp.join(root, prefix.get('img') or ''),
        voc=None if voc is None else osp.join(root, voc),
    )


def check_annotations(
    path: str, images: str | None = None, voc: str | None = None
) -> None:
    """Check an annotation file in COCO's (.json) or VOC's (.txt) layout.

    Args:
        path: The file.
        images: Folder of the images that a .json file names; with None the
            images are not checked.
        voc: Folder of the ``Annotations`` that a .txt file names; with None
            they are not checked.

    Raises:
        DataError: At the first problem.
    """
    remedy = remedy_for(path)
    if not osp.exists(path):
        missing = path
        while not osp.exists(osp.dirname(missing) or '.'):
            missing = osp.dirname(missing)
        raise DataError(
            f'{path}: expected the annotations of a data set, got nothing '
            f'({missing} does not exist). {remedy}'
        )
    if path.endswith('.json'):
        check_coco_annotations(path, images, remedy=remedy)
    elif path.endswith('.txt') and voc is not None:
        voc_check(voc, Path(path).stem, remedy=remedy)


def remedy_for(path: str) -> str:
    """Return a sentence that says how to get the data at ``path``."""
    for part in Path(path).parts:
        if part in PREPARED:
            return (
                f'Run `mmkd prepare {PREPARED[part]}` (with '
                '`--from FOLDER` for a local copy).'
            )
    return 'Mend the file, or correct data_root and ann_file in the config.'


def check_images(dataset: Dataset) -> None:
    """Check that a built data set has images and that their files are there.

    No image is opened. Images that are not in the file system
    (``backend_args``) are not checked.

    Args:
        dataset: The data set, with all that it wraps.

    Raises:
        DataError: If images are missing or empty. The message says how many,
            and names the first ones.
    """
    if not len(dataset):  # type: ignore[arg-type]
        lists = ''.join(
            _lists(named_classes(part), getattr(part, 'ann_file', None))
            for part in parts(dataset)
        )
        raise DataError(EMPTY + lists)
    for part in parts(dataset):
        if hasattr(part, 'get_data_info') and not getattr(
            part, 'backend_args', None
        ):
            _check_image_files(part)


def _check_image_files(dataset: Any) -> None:
    count = len(dataset)
    found: dict[str, dict[str, int]] = {}
    missing, empty = [], []
    for index in range(count):
        path = dataset.get_data_info(index).get('img_path')
        if not path or '://' in path:
            continue
        folder, name = osp.split(path)
        if folder not in found:
            found[folder] = _sizes(folder or '.')
        if name not in found[folder]:
            missing.append(path)
        elif not found[folder][name]:
            empty.append(path)
    for wrong, what in (
        (missing, 'do not exist'),
        (empty, 'are empty files (0 bytes)'),
    ):
        if wrong:
            raise DataError(
                f'{len(wrong)} of {count} images that the annotations name '
                f'{what}, the first: {", ".join(wrong[:3])}. '
                f'{remedy_for(wrong[0])}'
            )


def _sizes(folder: str) -> dict[str, int]:
    """Return the files of a folder with their sizes in bytes."""
    if not osp.isdir(folder):
        return {}
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # a link to nothing
                found[entry.name] = entry.stat().st_size
    return found


# ------------------------------------------------------------ while it is read


def name_unreadable_images(dataset: Dataset) -> None:
    """Let a data set name the image that it cannot read, or that is too large.

    MMDetection says only what the decoder says, and thereby stops a training
    without a word on which of its images is broken.

    Args:
        dataset: The built data set. All that it wraps are changed in place.
    """
    for part in parts(dataset):
        if hasattr(part, 'prepare_data'):
            prepare = functools.partial(_prepare, part, not _is_limited(part))
            part.prepare_data = prepare


def _is_limited(dataset: Any) -> bool:
    """Tell whether its decoder refuses images that are too large."""
    steps = getattr(getattr(dataset, 'pipeline', None), 'transforms', ())
    backends = {getattr(step, 'imdecode_backend', None) for step in steps}
    return is_limited(backends - {None} or {mmcv.image.io.imread_backend})


def _prepare(dataset: Any, look_first: bool, index: int) -> Any:
    """Do what ``dataset.prepare_data`` does."""
    if look_first:
        path = dataset.get_data_info(index).get('img_path')
        if isinstance(path, str) and (problem := too_large(path)):
            raise PictureError(problem)
    try:
        return type(dataset).prepare_data(dataset, index)
    except MMKDError:
        raise
    except Exception as error:
        path = dataset.get_data_info(index).get('img_path')
        if isinstance(path, str) and (problem := too_large(path)):
            raise PictureError(problem) from error
        problem = unreadable(path, error) if isinstance(path, str) else None
        if problem:
            raise PictureError(
                f'{path}: expected an image, got {problem}. Copy or prepare '
                'it again, or take it out of the annotations.'
            ) from error
        raise


def unreadable(path: str, error: Exception) -> str | None:
    """Say why an image file cannot be read; None if it can.

    Args:
        path: The file.
        error: What came up while it was read and augmented.
    """
    if not osp.isfile(path):
        return None if '://' in path else 'no file'
    size = osp.getsize(path)
    if not size:
        return 'an empty file (0 bytes)'
    content = np.fromfile(path, np.uint8)
    try:
        decoded = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    except cv2.error:  # sizes that its limits do not allow
        decoded = None
    if decoded is None:
        return f'a file that is damaged or of another kind ({size:,} bytes)'
    if isinstance(error, OSError):  # of another decoder
        return f'a file that is damaged ({size:,} bytes): {error}'
    return None


@contextmanager
def told_in_a_line() -> Iterator[None]:
    """Leave the stack trace out of what a worker of a loader reports."""
    try:
        yield
    except MMKDError as error:
        text = str(error).strip()
        if 'Original Traceback' not in text:
            raise
        last = text.splitlines()[-1].partition(': ')[2]
        raise type(error)(last) from error
