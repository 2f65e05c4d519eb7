"""The image that a graph takes, by the test pipeline of a config."""

import numpy as np
import pytest

from mmkd.detectors.source import load_config
from mmkd.errors import ConfigError
from mmkd.export.canvas import Canvas, canvas_for


@pytest.mark.parametrize(
    ('name', 'divisor', 'expected'),
    [
        ('retinanet/retinanet_r50_fpn_1x_coco.py', 32, Canvas(800, 1344)),
        ('detr/detr_r50_8xb2-150e_coco.py', 1, Canvas(800, 1333)),
        (
            'yolox/yolox_tiny_8xb8-300e_coco.py',
            32,
            Canvas(416, 416, padding=114.0),
        ),
        (
            'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
            32,
            Canvas(640, 640, padding=114.0),
        ),
        ('ssd/ssd300_coco.py', 1, Canvas(300, 300, keep_ratio=False)),
        ('pascal_voc/retinanet_r50_fpn_1x_voc0712.py', 32, Canvas(608, 1024)),
    ],
    ids=lambda value: str(value)[:9],
)
def test_of_stock_configs(name, divisor, expected):
    config = load_config(f'mmdet::{name}')
    assert canvas_for(config, divisor) == expected


def test_a_config_that_does_not_resize():
    name = 'mmdet::centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco.py'
    config = load_config(name)
    with pytest.raises(ConfigError, match='no Resize with a `scale`'):
        canvas_for(config, 32)
    canvas = canvas_for(config, 32, (512, 512))
    assert canvas.unknown == ('RandomCenterCropPad',)
    assert canvas.keep_ratio


def test_a_size_that_is_no_multiple():
    with pytest.raises(ConfigError, match=r'multiples of 32.*Give 96 128'):
        canvas_for({}, 32, (100, 130))


def test_a_picture_lies_in_the_corner():
    photo = np.full((50, 200, 3), 7, np.uint8)
    image, size = Canvas(60, 100).fit(photo)
    assert size.tolist() == [25, 100]
    assert (image[:25] == 7).all()
    assert not image[25:].any()
    image, size = Canvas(60, 100, keep_ratio=False).fit(photo)
    assert size.tolist() == [60, 100]
    assert (image == 7).all()
