"""Detectors that are no models of MMDetection, and run on single images."""

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.fileio import get

from mmkd.data.batch import Batch
from mmkd.data.pictures import too_large
from mmkd.data.unlabelled.views import UnlabelledImages
from mmkd.errors import ConfigError, PictureError

from .cache import check_cache_options, open_cache
from .detections import NOTHING, WHERE, DetectionsTeacher, Found, path_of
from .disk_cache import fast_hash
from .frozen import frozen_pass

REMEMBERED = 20_000
"""The detections of as many images are kept in memory."""


class ForeignDetector(DetectionsTeacher):
    """A detector that is no model of MMDetection.

    What it finds is kept in memory, and, with ``cache``, on disk, where
    processes and runs share it. The key of an entry is a hash of all that the
    detections depend on: the content of the image file (or, with
    ``sees='batch'``, the pixels), and :attr:`identity`.

    A kind of it overrides :meth:`detect`, and calls :meth:`identify` in its
    constructor.

    Args:
        classes: As in :class:`DetectionsTeacher`.
        cache: The folder ``dir`` and the limit ``max_gib`` (10 by default) of
            a cache on disk.
        **options: As in :class:`DetectionsTeacher`.

    Raises:
        ConfigError: If an option is wrong.
    """

    def __init__(
        self,
        classes: Sequence[str] | str,
        *,
        cache: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(classes, **options)
        self.identity = b''
        """A hash of the model and of how it sees and answers."""
        self._disk = None
        if cache is not None:
            self._disk = open_cache(**check_cache_options(cache))
        self._known: OrderedDict[str, Found] = OrderedDict()
        self._files: dict[str, tuple[tuple[int, int], bytes]] = {}

    def detect(
        self, images: Sequence[np.ndarray], names: Sequence[str]
    ) -> list[Found | None]:
        """Detect in images.

        Args:
            images: Each (H, W, 3), uint8, RGB.
            names: What they are called in messages.

        Returns:
            For each image, boxes in its pixels; None for an image on which
            the detector has failed, where failures are passed over.
        """
        raise NotImplementedError

    def identify(self, *facts: Any) -> None:
        """Set the identity by all that decides what is found.

        Args:
            facts: Hashes and options, whose text tells them apart.
        """
        text = repr((type(self).__name__, self.classes, *facts))
        self.identity = fast_hash(text.encode()).digest()

    def prepare_data(self, dataset: Any) -> None:
        super().prepare_data(dataset)
        if self.sees == 'file' and isinstance(dataset, UnlabelledImages):
            images = dataset.images
            files = len(images.paths())
            if files < len(images):
                raise ConfigError(
                    f'{WHERE} ({type(self).__name__}) looks at the original '
                    f'files (sees="file"), and {len(images) - files} of the '
                    f'{len(images)} unlabelled images are frames of a video. '
                    'Set sees="batch".'
                )

    def find(self, batch: Batch, log: dict[str, float]) -> list[Found]:
        paths = [path_of(sample) for sample in batch.data_samples]
        if self.sees == 'file':
            keys = [self._key_of(path) for path in paths]
            images: Sequence[np.ndarray] | None = None
        else:
            images = self.pixels(batch)
            keys = [self._key(image) for image in images]
        known = {key: self._recall(key) for key in keys}
        missing = {  # by key, as an image may be there twice
            key: number
            for number, key in enumerate(keys)
            if known[key] is None
        }
        hits = sum(known[key] is not None for key in keys)
        log['cache_hits'] = hits / max(len(keys), 1)
        if missing:
            names = [paths[number] for number in missing.values()]
            fresh = (
                [read_image(name) for name in names]
                if images is None
                else [images[number] for number in missing.values()]
            )
            found = self._detect(fresh, names)
            for key, each in zip(missing, found, strict=True):
                if each is not None:
                    self._keep(key, each)
                known[key] = each
        return [
            NOTHING if (found := known[key]) is None else found for key in keys
        ]

    @frozen_pass
    def _detect(
        self, images: Sequence[np.ndarray], names: Sequence[str]
    ) -> list[Found | None]:
        return self.detect(images, names)

    # -- keys ----------------------------------------------------------------

    def _key_of(self, path: str) -> str:
        """Return the key of a file, by its content."""
        try:
            status = os.stat(path)
            stamp = status.st_mtime_ns, status.st_size
        except OSError:  # not in the file system
            stamp = (-1, -1)
        stamped = self._files.get(path)
        if stamped is None or stamped[0] != stamp or stamp[0] < 0:
            digest = fast_hash(read_file(path)).digest()
            stamped = self._files[path] = (stamp, digest)
        return fast_hash(self.identity + stamped[1]).hexdigest()

    def _key(self, image: np.ndarray) -> str:
        digest = fast_hash(self.identity + repr(image.shape).encode())
        digest.update(image.data)
        return digest.hexdigest()

    # -- what is known -------------------------------------------------------

    def _recall(self, key: str) -> Found | None:
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        entry = None if self._disk is None else self._disk.read(key)
        if entry is None:
            return None
        found = Found(*(entry[name].numpy() for name in Found._fields))
        self._remember(key, found)
        return found

    def _keep(self, key: str, found: Found) -> None:
        self._remember(key, found)
        if self._disk is not None:
            entry = {
                name: torch.from_numpy(np.ascontiguousarray(part))
                for name, part in found._asdict().items()
            }
            self._disk.write(key, entry)

    def _remember(self, key: str, found: Found) -> None:
        self._known[key] = found
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)


def read_file(path: str) -> bytes:
    """Return the bytes of an image file, wherever MMEngine finds it.

    Raises:
        PictureError: If it is not there.
    """
    try:
        return get(path)
    except OSError as error:
        raise PictureError(
            f'{path}: expected an image for {WHERE}, got '
            f'"{error.strerror or error}". Bring the file back, or take it '
            'out of the annotations.'
        ) from error


def read_image(path: str) -> np.ndarray:
    """Return an image file as (H, W, 3), uint8, RGB, turned by its EXIF tag.

    Raises:
        PictureError: If it is not there, damaged or too large.
    """
    if problem := too_large(path):
        raise PictureError(problem)
    content = np.frombuffer(read_file(path), np.uint8)
    try:
        image = cv2.imdecode(content, cv2.IMREAD_COLOR)
    except cv2.error:  # empty, or of a size that its limits do not allow
        image = None
    if image is None:
        raise PictureError(
            f'{path}: expected an image, got a file that is damaged or of '
            f'another kind ({len(content):,} bytes). Copy it again, or take '
            'it out of the data.'
        )
    return np.ascontiguousarray(image[..., ::-1])
