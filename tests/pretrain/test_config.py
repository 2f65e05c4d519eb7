"""What a pretraining takes of detectors' configs."""

from pathlib import Path

import pytest
from mmengine.config import Config

from mmkd.data.layouts import read_data
from mmkd.data.layouts.splits import split_images
from mmkd.detectors.source import load_config
from mmkd.errors import ConfigError
from mmkd.pretrain.config import (
    Options,
    network_name,
    network_options,
    pretraining_config,
)
from tests.helpers import toy


def of(name, *, scratch=False):
    source = f'mmdet::{name}'
    return network_options(load_config(source), source, scratch=scratch)


def config(images=100, **options):
    network = of(toy.RETINANET)
    return pretraining_config(
        {'net': network}, Path('images.txt'), images, Options(**options)
    )


class TestNetworks:
    def test_the_stock_backbone_and_pixels(self):
        found = of(toy.RETINANET)
        assert found['rgb']
        assert found['mean'] == [123.675, 116.28, 103.53]
        assert found['backbone']['depth'] == 50
        assert found['backbone']['init_cfg']['type'] == 'Pretrained'

    def test_caffe_s_pixels(self):
        found = of('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py')
        assert not found['rgb']
        assert found['std'] == [1.0, 1.0, 1.0]

    def test_without_normalisation(self):
        found = of('yolox/yolox_s_8xb8-300e_coco.py')
        assert (found['mean'], found['std'], found['rgb']) == ([], [], False)

    def test_from_scratch(self):
        found = of(toy.RETINANET, scratch=True)
        assert found['backbone']['init_cfg'] is None
        stock = of(toy.RETINANET)['backbone']
        assert {**found['backbone'], 'init_cfg': 0} == {**stock, 'init_cfg': 0}

    def test_no_backbone(self):
        name = (
            'soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_'
            'semi-0.1-coco.py'
        )
        with pytest.raises(
            ConfigError, match=r'SoftTeacher with .*It has detector\.backbone'
        ):
            of(name)
        with pytest.raises(ConfigError, match=r'my\.py: expected a model'):
            network_options(
                Config(dict(model=dict(type='A'))), 'my.py', scratch=False
            )

    def test_names(self):
        taken = {}
        for source, expected in (
            ('mmdet::gfl/gfl_r50_fpn_1x_coco.py', 'gfl_r50_fpn_1x_coco'),
            ('a/student.v2-big.py', 'student_v2_big'),
            ('b/student.v2-big.py', 'student_v2_big_2'),
            ('c/student.v2-big.py', 'student_v2_big_3'),
        ):
            name = network_name(source, taken)
            assert name == expected
            taken[name] = None


class TestOptions:
    def test_the_learning_rate_follows_the_batch(self):
        lars = config(batch_size=64).optim_wrapper.optimizer
        assert (lars.type, lars.lr) == ('mmkd.LARS', 0.3 * 64 / 256)
        adam = config(optimizer='adamw', batch_size=32)
        assert adam.optim_wrapper.optimizer.lr == 0.001 * 32 / 256
        set_ = config(lr=0.7, weight_decay=0.0).optim_wrapper.optimizer
        assert (set_.lr, set_.weight_decay) == (0.7, 0.0)

    def test_a_batch_of_more_images_than_there_are(self):
        message = r'--batch-size 64 is more than there are images \(63\)'
        with pytest.raises(ConfigError, match=message):
            config(images=63)
        assert config(images=64).train_dataloader.drop_last

    def test_the_rise_is_shorter_than_the_run(self):
        with pytest.raises(ConfigError, match='--warmup-epochs must be from'):
            config(epochs=5, warmup=5)
        assert len(config(epochs=5).param_scheduler) == 1
        assert len(config(epochs=20).param_scheduler) == 2

    def test_what_networks_import(self):
        cfg = pretraining_config(
            {'net': of(toy.RETINANET)},
            Path('images.txt'),
            100,
            Options(),
            ['my_models'],
        )
        assert cfg.custom_imports.imports == ['my_models']
        assert 'custom_imports' not in config()


def test_the_tenth_of_bccd_s_labels(shared_data):
    """Those that the config names are what the seed draws."""
    reading = read_data(str(shared_data / 'bccd'))
    classes = {
        picture.path.stem: frozenset(item.name for item in picture.items)
        for picture in reading.pictures.values()
        if picture.split == 'train'
    }
    drawn = split_images(classes, (0.1, 0.9), seed=0)
    lists = shared_data / 'bccd' / 'BCCD' / 'ImageSets' / 'Main'
    names = (lists / 'train.txt').read_text().split()
    expected = [i for i, name in enumerate(names) if drawn[name] == 'train']
    cfg = Config.fromfile(toy.ROOT / 'configs' / 'semi' / 'bccd_labelled.py')
    assert list(cfg.train_dataloader.dataset.indices) == expected
