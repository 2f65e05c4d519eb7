"""Pictures that would not fit into memory are refused by their header."""

import re
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from mmkd.data import pictures
from mmkd.doctor.photos import look_at
from mmkd.errors import ConfigError
from tests.helpers import toy


def chunk(kind, content):
    end = struct.pack('>I', zlib.crc32(kind + content))
    return struct.pack('>I', len(content)) + kind + content + end


def png(width, height):
    """A grey picture of one bit for each pixel, all of them 0."""
    squeeze = zlib.compressobj(1)
    row = bytes(1 + -(-width // 8))
    rows = b''.join(
        squeeze.compress(row * 1000) for _ in range(height // 1000)
    )
    rows += squeeze.compress(row * (height % 1000)) + squeeze.flush()

    head = struct.pack('>IIBBBBB', width, height, 1, 0, 0, 0, 0)
    parts = (b'IHDR', head), (b'IDAT', rows), (b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*part) for part in parts)


@pytest.fixture(scope='session')
def bomb(tmp_path_factory):
    """900 megapixels, in less than a megabyte."""
    path = tmp_path_factory.mktemp('bomb') / 'bomb.png'
    path.write_bytes(png(30_000, 30_000))
    assert path.stat().st_size < 1 << 20
    return path


READ = r"""
import re, sys
from mmkd.cli import main
main(['--version'])
import cv2
try:
    print(cv2.imread(sys.argv[1]).shape)
except cv2.error as error:
    print(error)
status = open('/proc/self/status').read()
print(re.search(r'VmHWM:\s+(\d+)', status)[1])
"""


def test_a_command_s_decoder_refuses_before_it_allocates(bomb):
    words = [sys.executable, '-c', READ, str(bomb)]
    done = subprocess.run(
        words, cwd=toy.ROOT, capture_output=True, text=True, check=True
    )
    assert 'pixels <= CV_IO_MAX_IMAGE_PIXELS' in done.stdout
    assert int(done.stdout.split()[-1]) < 500_000  # KiB


def test_the_header_tells(bomb, tmp_path, monkeypatch):
    text = pictures.too_large(bomb)
    assert re.search(
        r'bomb\.png: expected an image of at most 268,435,456 pixels, got one '
        r'of 30,000 x 30,000\. .* OPENCV_IO_MAX_IMAGE_PIXELS', text
    )  # fmt: skip
    monkeypatch.setenv(pictures.VARIABLE, '900000000')
    assert pictures.too_large(bomb) is None
    small = tmp_path / 'small.png'
    small.write_bytes(png(10, 7))
    monkeypatch.setenv(pictures.VARIABLE, '70')
    assert pictures.too_large(small) is None
    monkeypatch.setenv(pictures.VARIABLE, '69')
    assert '10 x 7' in pictures.too_large(small)


def test_what_is_no_picture_is_left_to_the_decoder(tmp_path):
    assert pictures.too_large(tmp_path / 'none.png') is None
    assert pictures.too_large(tmp_path) is None
    path = tmp_path / 'x.png'
    for content in (b'', b'<html>', png(9, 9)[:20], b'II*\0' + b'\xff' * 40):
        path.write_bytes(content)
        assert pictures.too_large(path) is None


@pytest.mark.parametrize('text', ['-1', '0', 'many', '1e9', '9' * 5000])
def test_a_limit_that_is_no_number(monkeypatch, text):
    monkeypatch.setenv(pictures.VARIABLE, text)
    with pytest.raises(ConfigError, match='IO_MAX_IMAGE_PIXELS must be the'):
        pictures.pixel_limit()


def test_pages_that_one_decoder_reads_all(tmp_path, monkeypatch):
    import tifffile

    path = tmp_path / 'x.tif'
    with tifffile.TiffWriter(path) as file:
        for _ in range(5):
            file.write(np.zeros((10, 10), np.uint8), contiguous=False)
    monkeypatch.setenv(pictures.VARIABLE, '499')
    assert '10 x 10, 5 times' in pictures.too_large(path)


def test_whose_limit_holds(monkeypatch):
    monkeypatch.setattr(pictures, '_decoder_has', [2**28])
    assert pictures.is_limited(['cv2'])
    assert not pictures.is_limited(['pillow'])
    monkeypatch.setenv(pictures.VARIABLE, '100')  # set too late for OpenCV
    assert not pictures.is_limited(['cv2'])


@pytest.mark.parametrize('behind', [b'IHDR', b'IDAT', b''])
def test_a_png_is_turned_as_opencv_turns_it(tmp_path, behind):
    """Its tag may also lie behind the pixels, which are not decoded."""
    path = tmp_path / 'a.png'
    path.write_bytes(png(40, 1000))
    content, exif = path.read_bytes(), Image.Exif()
    exif[0x0112] = 6
    if behind:
        start = content.index(behind) - 4
        (length,) = struct.unpack('>I', content[start : start + 4])
        end = start + 12 + length
        tag = chunk(b'eXIf', exif.tobytes()[6:])
        path.write_bytes(content[:end] + tag + content[end:])
    with Image.open(path) as image:
        decoded = []
        image.load = lambda: decoded.append(image)
        orientation = pictures.orientation_of(image)
    assert not decoded
    assert orientation == (6 if behind else 1)
    shape = cv2.imread(str(path)).shape[:2]
    assert shape == ((40, 1000) if behind else (1000, 40))
    photo = look_at(str(path), {}, pictures.LIMIT, decode=False)
    assert photo.size == shape[::-1]
