"""Boxes on the original files follow the pixels through the pipeline."""

import random

import mmcv.transforms
import numpy as np
import pytest
import torch
from mmdet.datasets.transforms import RandomCrop
from mmdet.models.data_preprocessors import (
    BatchFixedSizePad,
    BatchSyncRandomResize,
    DetDataPreprocessor,
)
from mmdet.structures import DetDataSample

from mmkd.errors import ConfigError
from mmkd.teachers.geometry import follow, landed, moved
from tests.helpers.teaching import dataset_of, raw_boxes

RESIZE = dict(type='Resize', scale=(200, 150), keep_ratio=True)
FLIP = dict(
    type='RandomFlip',
    prob=[0.4, 0.3, 0.2],
    direction=['horizontal', 'vertical', 'diagonal'],
)
CROP = dict(
    type='RandomCrop',
    crop_size=(0.6, 0.6),
    crop_type='relative_range',
    allow_negative_crop=True,
)
WARP = dict(type='RandomAffine', max_rotate_degree=15.0, max_shear_degree=5.0)
SHIFT = dict(type='RandomAffine', max_rotate_degree=0.0, max_shear_degree=0.0)
CHOICE = dict(
    type='RandomChoice',
    transforms=[
        [dict(type='RandomChoiceResize', scales=[(200, 150), (90, 160)])],
        [
            dict(
                type='RandomResize',
                scale=(220, 160),
                ratio_range=(0.5, 1.5),
                keep_ratio=False,
            ),
            CROP,
        ],
    ],
)
AUGMENT = dict(
    type='RandAugment',
    aug_space=[
        [dict(type='ShearX', prob=1.0)],
        [dict(type='TranslateY', prob=1.0)],
        [dict(type='Color', prob=1.0)],
        [dict(type='Rotate', prob=1.0)],
    ],
    aug_num=1,
)
FIXED = dict(width=96, height=64, keep_ratio=True)
PIPELINES = {
    'none': [],
    'resize': [RESIZE],
    'all, clipped last': [RESIZE, FLIP, WARP, CROP],
    'all, upright': [
        *(FLIP, SHIFT, CROP, RESIZE),
        dict(type='Pad', size_divisor=32),
    ],
    'cut, then shown again': [CROP, SHIFT, RESIZE],
    'in one another': [CHOICE, FLIP],
    'by chance': [FLIP, AUGMENT],
    'shortest edge': [dict(type='ResizeShortestEdge', scale=90, max_size=150)],
    'fixed shape': [dict(type='FixShapeResize', **FIXED)],
    'fixed scale': [
        dict(type='FixScaleResize', scale=(90, 160), keep_ratio=True)
    ],
}


def seeded(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.mark.parametrize('name', PIPELINES)
def test_the_ground_truth_is_where_its_raw_boxes_are_moved_to(name, photos):
    """The pipeline's own boxes are the reference, as it has moved them."""
    dataset = dataset_of(*PIPELINES[name])
    follow(dataset, None, 'it')
    count = 0
    for index in range(8):
        raw = raw_boxes(dataset.get_data_info(index))
        seeded(index)
        sample = dataset[index]['data_samples']
        expected = sample.gt_instances.bboxes.tensor.numpy()
        boxes, left = landed(raw, sample)
        inside = boxes[left > 0]
        assert len(inside) == len(expected)
        np.testing.assert_allclose(inside, expected, atol=0.01)
        count += len(expected)
    assert count > 3


def test_random_numbers_and_images_stay_as_they_were():
    steps = PIPELINES['all, clipped last']
    plain, followed = dataset_of(*steps), dataset_of(*steps)
    seeded(7)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    follow(followed, None, 'it')
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()
    for index in range(4):
        seeded(index)
        expected = plain[index]
        seeded(index)
        got = followed[index]
        assert torch.equal(got['inputs'], expected['inputs'])
        keys = set(got['data_samples'].metainfo_keys())
        more = keys - set(expected['data_samples'].metainfo_keys())
        assert more == {'homography_matrix', 'cuts'}


def test_worked_out_by_hand():
    boxes = np.array([[10, 20, 30, 60]], np.float32)
    assert moved(boxes, None) is boxes
    flip = np.array([[-1, 0, 100], [0, 1, 0], [0, 0, 1]])
    assert moved(boxes, flip).tolist() == [[70, 20, 90, 60]]
    # By 90 degrees: (x, y) becomes (-y, x), moved right by 100.
    turn = np.array([[0, -1, 100], [1, 0, 0], [0, 0, 1]])
    assert moved(boxes, turn).tolist() == [[40, 10, 80, 30]]
    # A perspective halves all that lies at y = 20, and a third stays at 40.
    deep = np.array([[1, 0, 0], [0, 1, 0], [0, 0.05, 1]])
    expected = [[10 / 4, 10, 15, 15]]
    np.testing.assert_allclose(moved(boxes, deep), expected)


def sample_of(shape, **meta):
    return DetDataSample(metainfo=dict(img_shape=shape, **meta))


def test_the_share_that_is_left():
    boxes = np.array(
        [[0, 0, 10, 10], [-5, 0, 5, 10], [30, 0, 40, 5], [18, 8, 22, 12]],
        np.float32,
    )
    inside, left = landed(boxes, sample_of((10, 20)))
    assert inside[:2].tolist() == [[0, 0, 10, 10], [0, 0, 5, 10]]
    np.testing.assert_allclose(left, [1, 0.5, 0, 0.25])


def test_what_was_cut_off_does_not_come_back():
    """Cut to 20 columns, halved, padded to 40: 10 columns are the image's."""
    half = np.diag([0.5, 0.5, 1.0])
    sample = sample_of(
        (40, 40), homography_matrix=half, cuts=[(np.eye(3), (40, 20))]
    )
    boxes, left = landed(np.array([[10.0, 0, 30, 20], [24, 0, 30, 9]]), sample)
    assert boxes[0].tolist() == [5, 0, 10, 10]
    np.testing.assert_allclose(left, [0.5, 0])


CENTRE = dict(
    type='RandomCenterCropPad',
    crop_size=(64, 64),
    ratios=(1.0,),
    mean=[0, 0, 0],
    std=[1, 1, 1],
    to_rgb=False,
    test_pad_mode=None,
)
EXPAND = dict(type='Expand')


@pytest.mark.parametrize(
    'step',
    [
        dict(type='MinIoURandomCrop'),
        EXPAND,
        dict(type='RandomShift'),
        dict(type='CopyPaste'),
        dict(type='RandomChoice', transforms=[[RESIZE], [EXPAND]]),
        CENTRE,
    ],
    ids=lambda step: step['type'],
)
def test_what_moves_pixels_without_a_record_is_refused(step):
    dataset = dataset_of(RESIZE, step)
    name = step['type'].replace('RandomChoice', 'Expand')
    with pytest.raises(ConfigError, match=rf'it looks .* {name} may move'):
        follow(dataset, None, 'it')
    packed = dataset.pipeline.transforms[-1]
    assert 'homography_matrix' not in packed.meta_keys


def test_images_of_several_are_refused_wherever_they_are_made():
    inner = dataset_of(pipeline=[dict(type='LoadImageFromFile')])
    from mmdet.datasets import MultiImageMixDataset
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = MultiImageMixDataset(
            inner,
            [dict(type='Mosaic', img_scale=(64, 64)), dict(type='MixUp')],
        )
    with pytest.raises(ConfigError, match='Mosaic, MixUp may move'):
        follow(dataset, None, 'it')


class Unheard(RandomCrop):
    """A subclass may do anything; it is another transform."""


def test_transforms_that_are_not_known_are_refused_unless_they_are_trusted():
    dataset = dataset_of(RESIZE)
    steps = dataset.pipeline.transforms
    steps.insert(2, Unheard(crop_size=(8, 8)))
    steps.insert(2, mmcv.transforms.Resize(scale=(30, 30)))  # notes nothing
    with pytest.raises(ConfigError, match='Resize, Unheard may move'):
        follow(dataset, None, 'it')
    with pytest.raises(ConfigError, match=r'\. Resize may move'):
        follow(dataset, None, 'it', ['Unheard'])
    follow(dataset, None, 'it', ['Unheard', 'Resize'])


def test_the_preprocessor_may_pad_a_batch_and_not_resize_it():
    def preprocessor(*augments):
        result = DetDataPreprocessor()
        result.batch_augments = list(augments)
        return result

    dataset = dataset_of(RESIZE)
    follow(dataset, preprocessor(BatchFixedSizePad((64, 64))), 'it')
    resizing = preprocessor(BatchSyncRandomResize((64, 128)))
    with pytest.raises(ConfigError, match='BatchSyncRandomResize may move'):
        follow(dataset, resizing, 'it')
