"""Limit the pixels of a picture before it is decoded.

A file of less than a megabyte can hold a picture of 900 megapixels, which
takes 5.4 GB while it is decoded. OpenCV has a limit of its own, a gigapixel,
which it reads from the environment when it is loaded, and applies to what it
is about to allocate. The commands lower it. Where OpenCV was loaded before,
or another decoder is used, the header of each file is read first.
"""

import os
import struct
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from mmkd.errors import ConfigError

VARIABLE = 'OPENCV_IO_MAX_IMAGE_PIXELS'
LIMIT = 2**28
"""The default, in pixels: an image of 16,384 x 16,384."""
TURNED = ('JPEG', 'MPO', 'PNG')
"""Formats whose EXIF orientation OpenCV applies; Pillow applies TIFF's."""
ORIENTATION = 0x0112
_decoder_has: list[int] = []
"""The limit that OpenCV was loaded with, if the commands have set it."""


def pixel_limit() -> int:
    """Return how many pixels a picture may have.

    Raises:
        ConfigError: If the environment variable is no number.
    """
    text = os.environ.get(VARIABLE, '')
    if not text:
        return LIMIT
    if not text.isdecimal() or len(text) > 15 or not int(text):
        raise ConfigError(
            f'the environment variable {VARIABLE} must be the number of '
            f'pixels that an image may have, such as {LIMIT}, got {text!r}.'
        )
    return int(text)


def limit_decoder() -> None:
    """Let OpenCV, if it is not loaded yet, refuse what is too large."""
    if 'cv2' not in sys.modules:
        os.environ[VARIABLE] = str(pixel_limit())
        _decoder_has[:] = [pixel_limit()]


def is_limited(backends: Iterable[str | None] = ()) -> bool:
    """Tell whether these decoders of mmcv refuse what is too large."""
    opencv = all(backend in (None, 'cv2') for backend in backends)
    return opencv and _decoder_has == [pixel_limit()]


def too_large(path: Any) -> str | None:
    """Say by its header that a picture is too large, and what to do.

    Returns:
        The text of an error; None for what is small enough, and for files
        that do not exist or are damaged, of which the decoder has to tell.
    """
    from PIL import Image

    most = pixel_limit()
    try:
        with headers_alone(), Image.open(path) as image:
            width, height = image.size
            # tifffile reads all pages of a TIFF
            pages = image.n_frames if image.format == 'TIFF' else 1
    except Exception:  # whatever a damaged header brings about in Pillow
        return None
    if width * height * pages <= most:
        return None
    several = f', {pages:,} times' if pages > 1 else ''
    return (
        f'{path}: expected an image of at most {most:,} pixels, got one of '
        f'{width:,} x {height:,}{several}. Cut it into tiles, take it out of '
        f'the data, or set the environment variable {VARIABLE} to what the '
        'memory can hold.'
    )


@contextmanager
def headers_alone() -> Iterator[None]:
    """Let Pillow open pictures of any size, of which nothing is decoded."""
    from PIL import Image

    theirs = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = None
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = theirs


def orientation_of(image: Any) -> int:
    """Return the EXIF orientation by which OpenCV turns a picture.

    Args:
        image: The picture as Pillow has opened it.

    Returns:
        1 to 8; 1 for a picture that stays as it is.
    """
    from PIL import Image

    if image.format not in TURNED:
        return 1
    if image.format == 'PNG' and 'exif' not in image.info:
        # For a tag behind the pixels, Pillow would decode them.
        exif = Image.Exif()
        exif.load(b'Exif\x00\x00' + _png_exif(image.fp))
    else:
        exif = image.getexif()
    orientation = exif.get(ORIENTATION, 1)
    return orientation if orientation in range(1, 9) else 1


def _png_exif(file: Any) -> bytes:
    """Return the content of a PNG's eXIf chunk; empty without one."""
    place = file.tell()
    try:
        file.seek(8)
        while len(start := file.read(8)) == 8:
            length, name = struct.unpack('>I4s', start)
            if name == b'eXIf':
                return bytes(file.read(length))
            file.seek(length + 4, os.SEEK_CUR)
        return b''
    finally:
        file.seek(place)
