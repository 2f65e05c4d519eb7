"""Say what a path holds that is no data in a known layout."""

import json
import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from mmkd.errors import DataError

from ..errors import data_error, some
from ..files import shown
from .coco import is_coco
from .data import FOLDERS
from .listing import (
    ARCHIVES,
    IMAGES,
    VIDEOS,
    census,
    is_image,
    suffix_of,
    walk,
)

LABEL = (
    'Draw the boxes with a labelling tool (CVAT, Label Studio, LabelImg), '
    'export them with the images as COCO, YOLO or Pascal VOC, and give that '
    'folder.'
)
SOUGHT = (
    'data as COCO (*.json), Pascal VOC (*.xml), YOLO (data.yaml, labels/*.txt)'
    ' or a table of boxes (*.csv)'
)


def explain_file(path: Path) -> DataError:
    """The error for a file that describes no data."""
    suffix, expected = suffix_of(path.name), 'a folder of data'
    if suffix in VIDEOS:
        remedy = (
            f'Take pictures from it (ffmpeg -i {path.name} -r 2 '
            f'frames/%06d.jpg), or load it into CVAT. {LABEL}'
        )
        return data_error(path, expected, 'a video', remedy)
    if suffix in ARCHIVES:
        remedy = f'Unpack it (unzip {path.name} -d {path.stem}), and give '
        remedy += 'the folder.'
        return data_error(path, expected, 'an archive', remedy)
    if is_image(path.name):
        return data_error(path, expected, 'an image', LABEL)
    if suffix == '.xml':
        remedy = f'Give the folder: {path.parent}.'
        return data_error(path, expected, 'a single annotation', remedy)
    got = f'a file {suffix}' if suffix else 'a file'
    remedy = 'Give a folder, or its data.yaml, .json or .csv.'
    return data_error(path, expected, got, remedy)


def explain(root: Path, name: str = '') -> DataError:
    """The error for a folder without data in a known layout."""
    counts = census(root)
    folders = sorted(
        entry.name + '/'
        for entry in os.scandir(root)
        if entry.is_dir() and not entry.name.startswith('.')
    )
    if not counts and not folders:
        got, remedy = 'an empty folder', 'Check the path.'
        if name in FOLDERS:
            remedy = f'Run `mmkd prepare {name}`.'
        return data_error(root, SOUGHT, got, remedy)
    kinds = ', '.join(f'{n:,} {kind}' for kind, n in counts.most_common(5))
    got = kinds or 'no files'
    if folders:
        got += f' in {some(folders, 5)}'
    return data_error(root, SOUGHT, got, _guess(root, counts))


def _guess(root: Path, counts: Counter[str]) -> str:
    """What the files are most likely, and what helps."""
    images = sum(counts[suffix] for suffix in IMAGES)
    videos = sum(counts[suffix] for suffix in VIDEOS)
    labels = [s for s in ('.json', '.xml', '.csv', '.txt') if counts[s]]
    if videos and not images:
        return explain_video(videos)
    if not images and not labels:
        packed = [s for s in ARCHIVES if counts[s]]
        if packed:
            return f'Unpack the {packed[0]}, and give the folder.'
        if counts['.heic']:
            return 'Convert the .heic to .jpg first, which OpenCV reads.'
        return 'Check the path.'
    for suffix in labels:
        path = first_file(root, suffix)
        if path and (guess := KINDS[suffix](path)):
            what = guess.replace('{}', str(path.relative_to(root)))
            return f'{what}'
    if images:
        have = 'image has' if images == 1 else 'images have'
        return f'{images:,} {have} no labels. {LABEL}'
    return 'The images are missing: put them beside the labels.'


def explain_video(count: int) -> str:
    return (
        f'{"It is a video" if count == 1 else "They are videos"}: take '
        f'pictures (ffmpeg -i VIDEO -r 2 frames/%06d.jpg). {LABEL}'
    )


def first_file(root: Path, suffix: str) -> Path | None:
    return next(
        (
            folder / name
            for folder, files in walk(root, 100_000)
            for name in files
            if suffix_of(name) == suffix
        ),
        None,
    )


def _json(path: Path) -> str:
    if is_coco(path):
        return 'Give the folder of {} instead.'
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return '{} is no JSON: export it again.'
    if isinstance(content, list):
        first = content[0] if content else None
        if isinstance(first, dict) and 'annotations' in first:
            return '{} is the JSON of Label Studio or CreateML: export COCO.'
        return '{} is a list, and not COCO: export COCO.'
    if isinstance(content, dict):
        if 'shapes' in content:
            return '{} is of LabelMe: export COCO, YOLO or Pascal VOC.'
        keys = some(map(shown, content), 4) or 'none'
        return (
            f'{{}} is not COCO: it needs images, annotations and categories, '
            f'and has {keys}.'
        )
    return ''


def _xml(path: Path) -> str:
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError, LookupError, ValueError):
        return '{} is no XML: export it again.'
    if root.tag == 'annotations':
        return "{} is CVAT's own format: export COCO, YOLO or Pascal VOC."
    if root.tag != 'annotation':
        return f'{{}} is not Pascal VOC: it begins with <{root.tag}>.'
    return 'The images are missing: put them beside the annotations.'


def _csv(path: Path) -> str:
    first = _start(path)
    return (
        '{} names no image, class and box (filename, class, xmin, ymin, xmax, '
        f'ymax) in its first line: {shown(first)}.'
    )


def _txt(path: Path) -> str:
    texts = [p for p in path.parent.iterdir() if suffix_of(p.name) == '.txt']
    beside = sum(is_image(p.name) for p in path.parent.iterdir())
    images = f'beside {beside:,} images' if beside else 'without images'
    return (
        f'{len(texts):,} .txt {images}, but {{}} has no line of YOLO (class '
        f'x_centre y_centre width height): {shown(_start(path))}.'
    )


def _start(path: Path) -> str:
    try:
        with path.open(errors='replace') as file:
            return file.readline(2000).strip()
    except OSError as error:
        return str(error.strerror)


KINDS = {'.json': _json, '.xml': _xml, '.csv': _csv, '.txt': _txt}
