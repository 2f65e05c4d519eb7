"""Stock configs at toy scale."""

import copy

import pytest
import torch
from mmengine.config import ConfigDict

from mmkd.detectors.shrink import (
    SCALE,
    noise_batch,
    small_dataset,
    small_model,
    small_step,
)
from tests.helpers import toy


def init_cfgs(cfg):
    """Every ``init_cfg`` in a config."""
    if isinstance(cfg, dict):
        for key, value in cfg.items():
            if key == 'init_cfg':
                yield value
            yield from init_cfgs(value)
    elif isinstance(cfg, list | tuple):
        for item in cfg:
            yield from init_cfgs(item)


class TestModel:
    def test_it_fetches_nothing_and_leaves_the_original(self):
        stock = toy.stock(toy.FASTER_RCNN).model
        before = copy.deepcopy(stock)
        small = small_model(stock)
        assert stock == before
        assert any(
            (i or {}).get('type') == 'Pretrained' for i in init_cfgs(stock)
        )
        assert not any(
            (i or {}).get('type') == 'Pretrained' for i in init_cfgs(small)
        )

    def test_a_checkpoint_without_a_type(self):
        """As PVT's configs have it."""
        path = 'pvt/retinanet_pvt-t_fpn_1x_coco.py'
        stock = toy.stock(path).model.backbone
        assert 'type' not in stock.init_cfg
        assert small_model(ConfigDict(backbone=stock)).backbone == {
            **stock,
            'init_cfg': None,
        }

    def test_narrow(self):
        stock = toy.stock(toy.FASTER_RCNN).model
        small, wide = small_model(stock), small_model(stock, narrow=False)
        assert small.backbone.depth == 18
        assert small.neck.in_channels == [8, 16, 32, 64]
        assert small.neck.out_channels == small.rpn_head.in_channels == 32
        assert wide.backbone.depth == stock.backbone.depth
        assert wide.neck == stock.neck
        for each in (small, wide):
            assert each.train_cfg.rpn_proposal.max_per_img == 30
            # classes are what they were
            assert each.roi_head.bbox_head.num_classes == 80

    def test_an_hourglass_is_narrow_and_other_backbones_stay(self):
        hourglass = ConfigDict(
            type='HourglassNet', stage_channels=[256, 384], feat_channel=256
        )
        other = ConfigDict(type='CSPDarknet', out_channels=256)
        small = small_model(ConfigDict(backbone=hourglass)).backbone
        assert small.stage_channels == [32, 32]
        assert (small.type, small.feat_channel) == ('HourglassNet', 32)
        assert small_model(ConfigDict(backbone=other)).backbone == other


class TestData:
    @pytest.mark.parametrize(
        ('step', 'small'),
        [
            (dict(type='Resize', scale=(1333, 800)), dict(scale=SCALE)),
            (
                dict(type='RandomChoiceResize', scales=[(9, 8), (9, 7)]),
                dict(scales=[SCALE, SCALE]),
            ),
            (
                dict(type='RandomAffine', border=(-320, -320)),
                dict(border=(-64, -48)),
            ),
            (dict(type='RandomFlip', prob=0.5), dict(prob=0.5)),
        ],
    )
    def test_steps(self, step, small):
        step = ConfigDict(step)
        small_step(step)
        assert step == dict(small, type=step.type)

    def test_a_wrapped_dataset(self, tmp_path):
        inner = ConfigDict(type='CocoDataset', pipeline=[])
        outer = ConfigDict(
            type='MultiImageMixDataset',
            dataset=inner,
            pipeline=[dict(type='Resize', scale=(640, 640))],
        )
        small_dataset(outer, tmp_path, 3, (64, 32))
        assert outer.dataset.data_root == f'{tmp_path}/'
        assert outer.dataset.indices == 3
        assert outer.pipeline[0].scale == (64, 32)


def test_noise_is_the_same_every_time_and_in_the_images():
    options = dict(sizes=((96, 128), (80, 100)), objects=(3, 0), classes=5)
    first, again = (noise_batch(**options, masks=True) for _ in range(2))
    for image, other in zip(first['inputs'], again['inputs'], strict=True):
        assert torch.equal(image, other)
    objects = first['data_samples'][0].gt_instances
    assert len(objects) == len(objects.masks) == 3
    assert (objects.bboxes >= 0).all()
    assert (objects.bboxes <= torch.tensor([128, 96, 128, 96])).all()
    assert (objects.bboxes[:, 2:] > objects.bboxes[:, :2]).all()
    assert objects.labels.max() < 5
    assert len(first['data_samples'][1].gt_instances) == 0
    extras = noise_batch(**options, extras=True)['data_samples'][0]
    assert extras.gt_sem_seg.sem_seg.shape == (1, 96, 128)
    assert torch.equal(extras.proposals.bboxes, objects.bboxes + 2)
