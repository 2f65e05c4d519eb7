"""Data errors said before training, in the words of the user's folders.

MMDetection meets a missing folder as a bare ``FileNotFoundError``, a cut-off
annotation file as a ``JSONDecodeError`` and a missing image hours later in a
worker. Here they are found when the data sets are built.
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

from .data import DataError, check_coco_annotations, voc_check

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
"""Folder to the data set of ``tools/prepare_data.py`` that makes it."""


@contextmanager
def explain_data_error(cfg: Config, loader: str) -> Iterator[None]:
    """Turn an error of building ``cfg[loader]`` into one that helps.

    Raises:
        DataError: If the data are missing or malformed: which file, what was
            expected and found, and the command that prepares it. Any other
            error passes as it is.
    """
    try:
        yield
    except DataError:
        raise
    except DATA_ERRORS as error:
        dataset = (cfg.get(loader) or {}).get('dataset')
        try:
            if isinstance(dataset, Mapping):
                diagnose(dataset)
        except DataError as diagnosis:
            raise diagnosis from error
        raise


def diagnose(dataset: Mapping[str, Any]) -> None:
    """Check the files of a data set's config, also of those it wraps.

    Raises:
        DataError: At the first problem.
    """
    nested = [dataset['dataset']] if 'dataset' in dataset else []
    for inner in (*nested, *dataset.get('datasets', ())):
        diagnose(inner)
    annotations = dataset.get('ann_file')
    if not annotations:
        return
    root = dataset.get('data_root') or ''
    path = osp.join(root, annotations)
    remedy = remedy_for(path)
    if not osp.exists(path):
        missing = path
        while missing and not osp.exists(osp.dirname(missing) or '.'):
            missing = osp.dirname(missing)
        raise DataError(
            f'{path}: expected the annotations of a data set, got nothing '
            f'({missing} does not exist). {remedy}'
        )
    prefix = dataset.get('data_prefix') or {}
    if path.endswith('.json'):
        check_coco_annotations(
            path, osp.join(root, prefix.get('img', '')), remedy=remedy
        )
    elif path.endswith('.txt') and 'sub_data_root' in prefix:
        folder = osp.join(root, prefix['sub_data_root'])
        voc_check(folder, Path(path).stem, remedy=remedy)


def remedy_for(path: str) -> str:
    """The sentence that says how to get the data at ``path``."""
    for part in Path(path).parts:
        if part in PREPARED:
            return (
                f'Run `python tools/prepare_data.py {PREPARED[part]}` (with '
                '`--from FOLDER` for a local copy).'
            )
    return 'Mend the file, or correct data_root and ann_file in the config.'


def check_images(dataset: Dataset) -> None:
    """Check that a built data set has images and that their files exist.

    Each folder is listed once; no image is opened.

    Raises:
        DataError: Names the first missing files and how many there are.
    """
    count = len(dataset)  # type: ignore[arg-type]
    if not count:
        raise DataError(
            'the data set is empty: expected at least one image, got none '
            'behind filter_cfg (images without objects are dropped). Check '
            'the classes in metainfo and the annotation file.'
        )
    if not hasattr(dataset, 'get_data_info'):
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
            listed[folder] = set(os.listdir(folder or '.')) if exists else (
                set()
            )
        if name not in listed[folder]:
            missing.append(path)
    if missing:
        raise DataError(
            f'{len(missing)} of {count} images that the annotations name do '
            f'not exist, the first: {", ".join(missing[:3])}. '
            f'{remedy_for(missing[0])}'
        )
