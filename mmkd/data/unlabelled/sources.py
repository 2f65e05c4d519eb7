"""Where images without labels come from.

A source is a folder, a list of files, a video, a file of COCO's whose labels
are ignored, a data set of MMDetection, or several of these.
"""

import bisect
import itertools
import logging
import os
import os.path as osp
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import mmcv
import numpy as np
from mmdet.registry import DATASETS
from mmengine.config import ConfigDict
from mmengine.logging import print_log
from mmengine.registry import DefaultScope

from mmkd.errors import DataError, PictureError
from mmkd.utils import check_options

from ..class_names import parts
from ..datasets import leaves
from ..errors import some
from ..files import path_hint, read_json
from ..layouts.listing import images_below, is_image, suffix_of
from ..pictures import is_limited, too_large

WHERE = 'distillation.unlabelled.dataset'
VIDEOS = (
    *('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm'),
    '.wmv',
)
EXPECTED = (
    'Give a folder of images, a text file with a path in each line, a video, '
    "a file in COCO's format, the config of a data set of MMDetection, "
    "dict(video='…', start=0, stop=600, every=10), or a list of these."
)


class Images(Protocol):
    """Images that can be read one by one."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def read(self, index: int) -> np.ndarray:
        """Return an image, (H, W, 3), BGR, of 8 bits.

        Raises:
            PictureError: If it cannot be read.
        """
        ...

    def name(self, index: int) -> str:
        """Return what an image is called in messages: its path, say."""
        ...

    def paths(self) -> Sequence[str]:
        """Return the files of single images; none of a video."""
        ...


class ImageFiles:
    """Images that are each a file.

    Args:
        paths: The files.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = list(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return self._paths[index]

    def paths(self) -> Sequence[str]:
        return self._paths

    def read(self, index: int) -> np.ndarray:
        path = self._paths[index]
        if not is_limited() and (problem := too_large(path)):
            raise PictureError(problem)
        try:
            image = mmcv.imread(path, flag='color', backend='cv2')
        except (OSError, cv2.error, ValueError) as error:
            raise PictureError(f'{path}: {error}') from error
        if image is None:
            raise PictureError(f'{path} is damaged or of another kind.')
        return image


class VideoFrames:
    """The frames of a video, every one or some of them.

    Frames are looked up by their number, which OpenCV does quickly where the
    video has many key frames. Each process opens the video once.

    Args:
        path: The file.
        start: The number of the first frame, from 0.
        stop: The number of the frame before which it ends; None for all.
        every: The distance of two frames that are used.

    Raises:
        DataError: If the video cannot be opened, or the range holds no frame.
    """

    def __init__(
        self,
        path: str,
        start: int = 0,
        stop: int | None = None,
        every: int = 1,
    ) -> None:
        self.path = path
        self._capture: Any = None
        self._pid = self._at = 0
        length = self._length()
        stop = length if stop is None else min(stop, length)
        self._numbers = range(start, stop, every)
        if not self._numbers:
            raise DataError(
                f'{WHERE}: the frames {start} to {stop} of {path} are none; '
                f'it has {length}. Give another start and stop.'
            )

    def __len__(self) -> int:
        return len(self._numbers)

    def name(self, index: int) -> str:
        return f'{self.path}, frame {self._numbers[index]}'

    def paths(self) -> Sequence[str]:
        return ()

    def read(self, index: int) -> np.ndarray:
        image = self._frame(self._numbers[index])
        if image is None:
            raise PictureError(f'{self.name(index)} cannot be decoded.')
        return image

    def _length(self) -> int:
        """Return the number of frames that can be read.

        A video that was cut off promises more than it has.
        """
        promised = int(self._opened().get(cv2.CAP_PROP_FRAME_COUNT))
        if promised < 1 or self._frame(0) is None:
            raise DataError(
                f'{WHERE}: no frame of {self.path} can be read. It is damaged '
                'or of a kind that OpenCV does not know; convert it, to MP4 '
                'with H.264, say, or give a folder of its frames.'
            )
        if self._frame(promised - 1) is not None:
            return promised
        found = bisect.bisect_left(
            range(promised), True, key=lambda n: self._frame(n) is None
        )
        print_log(
            f'{self.path} ends early: it promises {promised} frames, of which '
            f'{found} can be read. These are used.',
            'current',
            logging.WARNING,
        )
        return found

    def _frame(self, number: int) -> np.ndarray | None:
        capture = self._opened()
        if number != self._at:
            capture.set(cv2.CAP_PROP_POS_FRAMES, number)
        done, image = capture.read()
        self._at = number + 1 if done else -1
        return image if done else None

    def _opened(self) -> Any:
        if self._capture is None or self._pid != os.getpid():
            self._capture, self._pid = cv2.VideoCapture(self.path), os.getpid()
            self._at = 0
        return self._capture

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_capture': None}


class JoinedImages:
    """The images of several sources, one after the other."""

    def __init__(self, sources: Sequence[Images]) -> None:
        self.sources = list(sources)
        self._ends = list(itertools.accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> np.ndarray:
        source, inner = self._place(index)
        return source.read(inner)

    def name(self, index: int) -> str:
        source, inner = self._place(index)
        return source.name(inner)

    def paths(self) -> Sequence[str]:
        return [path for each in self.sources for path in each.paths()]

    def _place(self, index: int) -> tuple[Images, int]:
        number = bisect.bisect_right(self._ends, index)
        return self.sources[number], index - ([0, *self._ends][number])


def find_images(spec: Any) -> Images:
    """Return the images that ``distillation.unlabelled.dataset`` describes.

    Args:
        spec: A path, or a dict, or a list of these; see ``EXPECTED``.

    Raises:
        DataError: If there is nothing of the kind, or no image in it.
    """
    if isinstance(spec, Mapping):
        return _described(spec)
    if isinstance(spec, list | tuple) and spec:
        return JoinedImages([find_images(each) for each in spec])
    if not isinstance(spec, str | Path):
        raise DataError(f'{WHERE} is {spec!r}. {EXPECTED}')
    path = Path(spec).expanduser()
    if path.is_dir():
        files = [str(each) for each in images_below(path)]
        return _present(files, f'the folder {path}')
    if not path.is_file():
        raise DataError(
            f'{WHERE}: {spec} does not exist. {path_hint(path)}{EXPECTED}'
        )
    suffix = suffix_of(path.name)
    if suffix in VIDEOS:
        return VideoFrames(str(path))
    if suffix == '.json':
        return _present(_of_coco(path), f'{path}')
    if suffix == '.txt':
        return _present(_listed(path), f'the list {path}')
    if is_image(path.name):
        return ImageFiles([str(path)])
    raise DataError(f'{WHERE}: {spec} is of an unknown kind. {EXPECTED}')


def _described(spec: Mapping[str, Any]) -> Images:
    if 'video' in spec:
        check_options(WHERE, spec, ('video', 'start', 'stop', 'every'))
        options = dict(spec)
        path = str(Path(options.pop('video')).expanduser())
        if not osp.isfile(path):
            raise DataError(
                f'{WHERE}: the video {path} does not exist. {path_hint(path)}'
                'Give the path of a video.'
            )
        return VideoFrames(path, **options)
    if 'type' not in spec:
        raise DataError(f'{WHERE} is a dict without "type". {EXPECTED}')
    config = ConfigDict(spec).to_dict()
    for leaf in leaves(config):
        # Without labels nothing is to be filtered, and nothing transformed.
        leaf.update(pipeline=[], test_mode=True)
    with DefaultScope.overwrite_default_scope('mmdet'):
        built = DATASETS.build(config)
    paths = [
        part.get_data_info(index)['img_path']
        for part in parts(built)
        for index in range(len(part))
    ]
    return _present(paths, f'the {spec["type"]}')


def _of_coco(path: Path) -> Iterator[str]:
    """Yield the images of a COCO file; they lie beside it or above."""
    content = read_json(path)
    rows = content.get('images') if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get('file_name'), str)
        for row in rows
    ):
        raise DataError(
            f'{path}: expected a list "images" whose entries have a '
            '"file_name", as in COCO, got something else. Give such a file, '
            'or a text file with a path in each line.'
        )
    names = [row['file_name'] for row in rows]
    folders = [path.parent, *_siblings(path)]
    folder = next(
        (f for f in folders if names and (f / names[0]).is_file()), None
    )
    if names and folder is None:
        raise DataError(
            f'{path} names {names[0]}, which is neither beside it nor in a '
            'folder near it. Give the data set of MMDetection instead, which '
            "says where its images are: dict(type='CocoDataset', "
            f"ann_file='{path}', data_prefix=dict(img='…/'))."
        )
    for name in names:
        yield str((folder or path.parent) / name)


def _siblings(path: Path) -> Iterator[Path]:
    """Yield the folders next to a file and its folder, and what is above."""
    for parent in (path.parent, path.parent.parent):
        yield from (p for p in sorted(parent.iterdir()) if p.is_dir())
        yield parent


def _listed(path: Path) -> Iterator[str]:
    """Yield the paths in a text file; relative ones are beside it."""
    for line in path.read_text().splitlines():
        if line.strip():
            yield str(path.parent / Path(line.strip()).expanduser())


def _present(paths: Iterator[str] | Sequence[str], where: str) -> ImageFiles:
    """Return the images that are there; one warning names the others."""
    paths = list(paths)
    here = [p for p in paths if '://' in p or (osp.isfile(p) and _size(p))]
    if not here:
        told = f'none of its {len(paths)} images is' if paths else 'no image'
        raise DataError(
            f'{WHERE}: {where} has {told} there'
            f'{f", such as {paths[0]}" if paths else ""}. {EXPECTED}'
        )
    if len(here) < len(paths):
        lost = sorted(set(paths) - set(here))
        print_log(
            f'{WHERE}: {len(paths) - len(here)} of {len(paths)} images of '
            f'{where} are missing or empty and left out: {some(lost)}.',
            'current',
            logging.WARNING,
        )
    return ImageFiles(here)


def _size(path: str) -> int:
    return os.stat(path).st_size
