"""Report errors in the data before training, in terms of the user's files.

MMDetection raises a bare ``FileNotFoundError`` for a missing folder, a
``JSONDecodeError`` for a truncated annotation file, and fails hours later in
a worker for a missing image. The checks here find all of them when the data
sets are built.
"""

import os
import os.path as osp
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

from mmengine.config import Config
from torch.utils.data import Dataset

from mmkd.data import check_coco_annotations, voc_check
from mmkd.errors import DataError

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
            raise DataError(EMPTY) from error
        raise


def diagnose(dataset: Mapping[str, Any]) -> None:
    """Check the files that a data set's config names, and those it wraps.

    Args:
        dataset: The config of the data set.

    Raises:
        DataError: At the first problem.
    """
    nested = [dataset['dataset']] if 'dataset' in dataset else []
    for inner in (*nested, *dataset.get('datasets', ())):
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
    """Check that a built data set has images and that their files exist.

    Each folder is listed once, and no image is opened. Images that are not in
    the file system (``backend_args``) are not checked.

    Args:
        dataset: The data set.

    Raises:
        DataError: If images are missing. The message says how many, and names
            the first ones.
    """
    count = len(dataset)  # type: ignore[arg-type]
    if not count:
        raise DataError(EMPTY)
    if not hasattr(dataset, 'get_data_info') or getattr(
        dataset, 'backend_args', None
    ):
        return
    listed: dict[str, set[str]] = {}
    missing = []
    for index in range(count):
        path = dataset.get_data_info(index).get('img_path')
        if not path or '://' in path:
            continue
        folder, name = osp.split(path)
        if folder not in listed:
            exists = osp.isdir(folder or '.')
            listed[folder] = set(os.listdir(folder or '.') if exists else ())
        if name not in listed[folder]:
            missing.append(path)
    if missing:
        raise DataError(
            f'{len(missing)} of {count} images that the annotations name do '
            f'not exist, the first: {", ".join(missing[:3])}. '
            f'{remedy_for(missing[0])}'
        )
