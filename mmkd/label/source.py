"""The images that are to be labelled: a folder, a file of names, a video."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmdet.registry import DATASETS
from mmdet.utils import register_all_modules
from mmengine.registry import DefaultScope

from mmkd.data import check_coco_annotations, data_error, read_json
from mmkd.data.layouts import FOLDERS, find_data
from mmkd.data.layouts.listing import (
    VIDEOS,
    images_below,
    is_image,
    suffix_of,
)
from mmkd.errors import PictureError
from mmkd.teachers.foreign import read_image

Loaded = tuple['Item', np.ndarray | None, str]
"""An image, its pixels (H, W, 3), uint8, RGB, and why there are none."""


@dataclass(frozen=True)
class Item:
    """An image to be labelled.

    Attributes:
        id: Its id in the result.
        name: What the result calls its file.
        path: The file; that of the video for a frame.
    """

    id: Any
    name: str
    path: str


class Pictures:
    """Images that are files.

    Args:
        items: The images.
        where: What they are called in messages.
    """

    def __init__(self, items: Sequence[Item], where: str) -> None:
        self.items, self.where = list(items), where

    def read(self, items: Sequence[Item]) -> Iterator[Loaded]:
        """Yield images with their pixels, or with why there are none."""
        for item in items:
            try:
                yield item, read_image(item.path), ''
            except PictureError as error:
                yield item, None, str(error)


class Video:
    """The frames of a video, which count from 0.

    Args:
        path: The file.

    Raises:
        DataError: If OpenCV cannot read it.
    """

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        capture = self._open()
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        capture.release()
        self.promised = max(count, 0)
        self.items = [
            Item(number, f'{path.name}/{number:06}.jpg', str(path))
            for number in range(self.promised or self._count())
        ]

    def read(self, items: Sequence[Item]) -> Iterator[Loaded]:
        """Yield frames with their pixels, in order.

        Frames between them are skipped and not decoded. Where the video ends
        early, the rest has no pixels.
        """
        capture, place = self._open(), 0
        frame: Any = None
        try:
            for item in sorted(items, key=lambda each: each.id):
                while place < item.id and capture.grab():
                    place += 1
                there = place == item.id
                if there:
                    there, frame = capture.read()
                    place += there
                if not there:
                    yield item, None, 'the video ends before this frame'
                    continue
                yield item, np.ascontiguousarray(frame[..., ::-1]), ''
        finally:
            capture.release()

    def _open(self) -> Any:
        capture = cv2.VideoCapture(self.where)
        if not capture.isOpened():
            raise data_error(
                self.where,
                'a video',
                'a file that OpenCV cannot read',
                'Convert it (ffmpeg -i IN OUT.mp4), or give a folder of its '
                'frames.',
            )
        return capture

    def _count(self) -> int:
        """Count the frames of a video that does not tell."""
        capture, count = self._open(), 0
        while capture.grab():
            count += 1
        capture.release()
        return count


Source = Pictures | Video


def find_source(
    name: str, images: Path | None = None, split: str | None = None
) -> Source:
    """Return the images of what the user names.

    Args:
        name: A folder, whose images are all taken, wherever in it they are; a
            COCO file; an image; a video; or data in any layout of
            ``mmkd prepare own``, of which ``split`` is taken.
        images: The folder that the names in a COCO file begin in.
        split: ``train``, ``val`` or ``test``.

    Raises:
        DataError: If there are no images.
    """
    path = Path(name).expanduser()
    if split is not None or (name in FOLDERS and not path.exists()):
        return _of_data(name, split or 'train')
    if path.is_dir():
        found = images_below(path)
        items = [
            Item(number, file.relative_to(path).as_posix(), str(file))
            for number, file in enumerate(found, 1)
        ]
    elif not path.is_file():
        raise data_error(name, 'images', 'nothing', 'Check the path.')
    elif suffix_of(name) == '.json':
        items = _of_coco(path, images)
    elif suffix_of(name) in VIDEOS:
        return Video(path)
    elif is_image(name):
        items = [Item(1, path.name, str(path))]
    else:
        return _of_data(name, 'train')
    if not items:
        raise data_error(
            name, 'images', 'a folder without any', 'Check the path.'
        )
    return Pictures(items, name)


def _of_coco(path: Path, images: Path | None) -> list[Item]:
    check_coco_annotations(path, annotated=False)
    rows = read_json(path)['images']
    root = images or _root_of(path, rows[0]['file_name'])
    return [
        Item(row['id'], row['file_name'], str(root / row['file_name']))
        for row in rows
    ]


def _root_of(path: Path, name: str) -> Path:
    """Find the folder that the names of a COCO file begin in."""
    near = [path.parent, path.parent.parent]
    near += [d for p in near for d in sorted(p.iterdir()) if d.is_dir()]
    for folder in near:
        if (folder / name).is_file():
            return folder
    raise data_error(
        path, f'the image {name} near it', 'none', 'Give --images FOLDER.'
    )


def _of_data(name: str, split: str) -> Source:
    data = find_data(name)
    config = getattr(data, split)
    if not config:
        raise data_error(
            name, f'a split "{split}"', 'none', 'Give another --split.'
        )
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(
            {
                **config,
                'pipeline': [],
                'test_mode': True,
                'metainfo': dict(classes=data.classes),
            }
        )
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    root = os.path.commonpath([os.path.dirname(i['img_path']) for i in infos])
    return Pictures(
        [
            Item(
                info['img_id'],
                os.path.relpath(info['img_path'], root),
                info['img_path'],
            )
            for info in infos
        ],
        f'{name} ({split})',
    )
