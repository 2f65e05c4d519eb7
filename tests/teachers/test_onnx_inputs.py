"""Pictures become inputs, and boxes come back to the pictures."""

import cv2
import numpy as np
import pytest

from mmkd.errors import ConfigError
from mmkd.teachers.onnx_inputs import Preprocessing

PLAIN = dict(mean=(0, 0, 0), std=(1, 1, 1))


def photo(height=30, width=60):
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def test_stretched():
    picture = photo()
    pixels, frame = Preprocessing((64, 48), resize='stretch', **PLAIN)(picture)
    expected = cv2.resize(picture, (48, 64)).transpose(2, 0, 1)
    assert (pixels == expected).all()
    assert pixels.dtype == np.float32
    assert frame.scale == (48 / 60, 64 / 30)
    back = frame.back(np.array([[24, 32, 48, 64]], np.float32))
    np.testing.assert_allclose(back, [[30, 15, 60, 30]], rtol=1e-6)


@pytest.mark.parametrize(
    ('resize', 'top', 'left'), [('fit', 0, 0), ('letterbox', 16, 0)]
)
def test_in_its_shape(resize, top, left):
    """A picture of 30 x 60 becomes 32 x 64 in an input of 64 x 64."""
    picture = photo()
    pixels, frame = Preprocessing(
        (64, 64), resize=resize, pad_value=7, **PLAIN
    )(picture)
    expected = np.full((64, 64, 3), 7)
    inner = cv2.resize(picture, (64, 32))
    expected[top : top + 32, left : left + 64] = inner
    assert (pixels == expected.transpose(2, 0, 1)).all()
    whole = np.array([[left, top, left + 64, top + 32]], np.float32)
    np.testing.assert_allclose(frame.back(whole), [[0, 0, 60, 30]], rtol=1e-6)


def test_the_odd_line_of_padding_comes_last():
    """61 lines of 64 are the picture's: one above, two below."""
    pixels, frame = Preprocessing((64, 64), pad_value=0, **PLAIN)(
        np.full((61, 64, 3), 9, np.uint8)
    )
    assert frame.offset == (0, 1)
    lines = pixels[0].max(1)
    assert lines[0] == 0
    assert (lines[1:62] == 9).all()
    assert (lines[62:] == 0).all()


@pytest.mark.parametrize('to_rgb', [True, False])
def test_normalised_in_the_order_of_the_input(to_rgb):
    """(x - mean) / std, padding included, worked out by hand."""
    picture = np.zeros((2, 4, 3), np.uint8)
    picture[...] = 10, 20, 30
    pixels, _ = Preprocessing(
        (4, 4),
        resize='fit',
        mean=(1, 2, 3),
        std=(2, 4, 5),
        to_rgb=to_rgb,
        pad_value=6,
    )(picture)
    order = [10, 20, 30] if to_rgb else [30, 20, 10]
    expected = [(order[0] - 1) / 2, (order[1] - 2) / 4, (order[2] - 3) / 5]
    np.testing.assert_allclose(pixels[:, 0, 0], expected)
    np.testing.assert_allclose(pixels[:, 3, 0], [5 / 2, 4 / 4, 3 / 5])


def test_boxes_of_any_picture_come_back():
    rng = np.random.default_rng(0)
    for resize in ('letterbox', 'fit', 'stretch'):
        step = Preprocessing((96, 128), resize=resize)
        for height, width in rng.integers(20, 300, (5, 2)):
            _, frame = step(photo(height, width))
            boxes = rng.uniform(0, 1, (7, 4)) * [width, height, width, height]
            there = boxes * (frame.scale * 2) + frame.offset * 2
            np.testing.assert_allclose(frame.back(there), boxes, rtol=1e-5)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(resize='crop'), 'resize must be one of letterbox, fit, stretch'),
        (dict(mean=3), r'mean must be three numbers.*got 3'),
        (dict(std=(1, 1)), r'std must be three numbers'),
        (dict(std=(1, 0, 1)), r'no std of 0'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        Preprocessing((64, 64), **options)
