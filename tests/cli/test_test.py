"""`mmkd test` with options that MMDetection's tools/test.py has."""

import copy
import os.path as osp
import pickle

import mmdet
import pytest
import torch
from mmdet.models import DetTTAModel
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import MODELS

from mmkd.cli.test import augment, check_no_masks, load_config, parse_args
from mmkd.errors import ConfigError
from tests.helpers import tiny_detectors as tiny
from tests.helpers import toy

THEIRS = osp.join(osp.dirname(mmdet.__file__), '.mim', 'tools', 'test.py')
PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale=scale, keep_ratio=True)
                for scale in ((128, 96), (160, 128))
            ],
            [dict(type='RandomFlip', prob=p) for p in (1.0, 0.0)],
            [dict(type='LoadAnnotations', with_bbox=True)],
            [
                dict(
                    type='PackDetInputs',
                    meta_keys=(
                        *('img_id', 'img_path', 'ori_shape', 'img_shape'),
                        *('scale_factor', 'flip', 'flip_direction'),
                    ),
                )
            ],
        ],
    ),
]
MODEL = dict(
    type='DetTTAModel',
    tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.3), max_per_img=7),
)


def plain(folder, **options):
    """A config without the stock one's augmentation of large images."""
    cfg = toy.plain(folder, toy.RETINANET, **options)
    cfg.pop('tta_model')
    cfg.pop('tta_pipeline')
    return cfg


def predicted(folder, script, config, *arguments):
    """The predictions of a tool, and the metrics that it has printed."""
    job = toy.tool(
        folder / 'log',
        script,
        *(config, folder / 'weights.pth', *arguments),
        *('--out', folder / 'found.pkl', '--work-dir', folder / 'run'),
    )
    assert job.process.exitcode == 0, job.text()[-3000:]
    found = pickle.loads((folder / 'found.pkl').read_bytes())
    lines = [text for text in job.text().splitlines() if 'mAP_50' in text]
    return found, lines[-1].partition('coco/')[2].partition('  data_time')[0]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A tiny detector, its weights, and its config with and without TTA."""
    folder = tmp_path_factory.mktemp('tested')
    cfg = plain(folder / 'run', images=2)
    # Without training all scores are about 0.01.
    cfg.model.test_cfg.update(score_thr=0.0, max_per_img=20)
    model = toy.detector(cfg.model)
    with torch.no_grad():
        for layer in (model.bbox_head.retina_cls, model.bbox_head.retina_reg):
            layer.weight.mul_(1000.0)
    torch.save(dict(state_dict=model.state_dict()), folder / 'weights.pth')
    toy.write(cfg, folder / 'default.py')
    cfg.tta_model, cfg.tta_pipeline = MODEL, PIPELINE
    toy.write(cfg, folder / 'own.py')
    return folder


@pytest.mark.parametrize('config', ['default.py', 'own.py'])
def test_augmented_as_by_mmdetection(folder, config):
    """Equal boxes, scores, labels and AP, and others than without."""
    path = folder / config
    theirs, their_metrics = predicted(folder, THEIRS, path, '--tta')
    ours, our_metrics = predicted(folder, 'tools/test.py', path, '--tta')
    without, _ = predicted(folder, 'tools/test.py', path)
    assert len(ours) == len(theirs) == 4
    assert our_metrics == their_metrics
    for mine, other, third in zip(ours, theirs, without, strict=True):
        assert mine['img_id'] == other['img_id']
        a, b, c = (r['pred_instances'] for r in (mine, other, third))
        assert toy.same(dict(a), dict(b))
        assert len(a['scores']) == 7 or config == 'default.py'
        assert len(a['scores']) >= 7
        assert not toy.same(a['scores'], c['scores'])


def test_the_augmentation_of_wrapped_data_sets(tmp_path):
    """It reaches the pipelines; wrappers have none."""
    cfg = plain(tmp_path)
    inner = cfg.test_dataloader.dataset
    wrapped = dict(type='RepeatDataset', times=1, dataset=inner)
    cfg.test_dataloader.dataset = dict(
        type='ConcatDataset', datasets=[wrapped, copy.deepcopy(inner)]
    )
    augment(cfg)
    concat = cfg.test_dataloader.dataset
    assert 'pipeline' not in concat
    first, second = concat.datasets
    assert 'pipeline' not in first
    for dataset in (first.dataset, second):
        kinds = [step.type for step in dataset.pipeline]
        assert kinds == [
            'LoadImageFromFile',
            'Resize',
            'LoadAnnotations',
            'TestTimeAug',
        ]


def test_a_default_is_said(tmp_path, logged):
    cfg = plain(tmp_path)
    cfg.tta_model = MODEL
    augment(cfg)
    assert [text for text in logged if '--tta' in text] == [
        "The config has no tta_pipeline: --tta takes MMDetection's, the "
        'image and its mirror image'
    ]


def test_a_pipeline_that_cannot_be_augmented(tmp_path):
    cfg = plain(tmp_path)
    cfg.test_dataloader.dataset.pipeline.pop()
    with pytest.raises(
        ConfigError, match=r'ends in LoadAnnotations.*a tta_pipeline'
    ):
        augment(cfg)


def test_masks_cannot_be_merged():
    register_all_modules(init_default_scope=False)
    mask_rcnn = MODELS.build({'_scope_': 'mmdet', **tiny.mask_rcnn()})
    with pytest.raises(ConfigError, match=r'--tta merges boxes.*MaskRCNN'):
        check_no_masks(DetTTAModel(module=mask_rcnn))
    check_no_masks(DetTTAModel(module=tiny.build(tiny.gfl())))
    check_no_masks(mask_rcnn)


def test_types_that_are_classes(tmp_path):
    """What the command does by a type's name, it does by the class."""
    from mmdet.evaluation import CocoMetric

    from mmkd.peers.ensemble import EnsembleDetector

    cfg = plain(tmp_path)
    (tmp_path / 'w.pth').touch()
    path = toy.write(cfg, tmp_path / 'a.py')

    def loaded(monkey, *arguments, **changes):
        monkey.setattr(
            'mmkd.cli.test.read_config',
            lambda args: Config({**cfg.to_dict(), **changes}),
        )
        return load_config(parse_args([str(path), *arguments]))

    with pytest.MonkeyPatch.context() as monkey:
        found = loaded(
            monkey,
            *(str(tmp_path / 'w.pth'), '--json-prefix', 'x'),
            test_evaluator=dict(type=CocoMetric),
        )
        assert found.test_evaluator.outfile_prefix == 'x'
        loaded(monkey, model=dict(type=EnsembleDetector))
        with pytest.raises(ConfigError, match='ensemble takes no checkpoint'):
            loaded(monkey, 'w.pth', model=dict(type=EnsembleDetector))
