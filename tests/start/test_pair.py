"""What two networks decide, for detectors of all kinds."""

import functools

import pytest

from mmkd.detectors.shrink import small_model
from mmkd.detectors.source import load_config
from mmkd.errors import ConfigError
from mmkd.start.config_text import fitted, published_methods, tried_methods
from mmkd.start.pair import Pair
from tests.helpers import toy

KINDS = dict(
    retinanet=toy.RETINANET,
    faster_rcnn=toy.FASTER_RCNN,
    c4='faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py',
    gfl='gfl/gfl_r50_fpn_1x_coco.py',
    yolox='yolox/yolox_tiny_8xb8-300e_coco.py',
    detr='detr/detr_r50_8xb2-150e_coco.py',
)
FEATURES = ['cwd', 'fbkd', 'fgd', 'hint', 'mgd', 'pkd', 'tat']


@functools.cache
def config(kind):
    cfg = load_config(f'mmdet::{KINDS[kind]}')
    cfg.model = small_model(cfg.model)
    return cfg


def chosen(pair, *methods):
    options, _ = published_methods(methods, *pair.configs)
    return fitted(options, pair)


@pytest.mark.parametrize(
    ('student', 'teacher', 'levels'),
    [
        ('retinanet', 'faster_rcnn', ([0, 1, 2, 3], [1, 2, 3, 4])),
        ('faster_rcnn', 'retinanet', ([1, 2, 3, 4], [0, 1, 2, 3])),
        ('c4', 'faster_rcnn', ([0], [2])),
        ('yolox', 'faster_rcnn', ([0, 1, 2], [1, 2, 3])),
        ('yolox', 'retinanet', ([0, 1, 2], [0, 1, 2])),
        ('detr', 'retinanet', ([0], [2])),
        ('retinanet', 'detr', ([2], [0])),
        ('gfl', 'retinanet', (None, None)),
    ],
)
def test_levels_of_the_same_strides(student, teacher, levels):
    pair = Pair(config(student), config(teacher))
    options, why = chosen(pair, 'cwd')
    found = options['cwd']
    assert (found['levels'], found['teacher_levels']) == levels
    assert len(why) == (levels[0] is not None)


def test_what_features_fit_all_kinds():
    """No method on features ends in an error that options avoid."""
    pair = Pair(config('yolox'), config('faster_rcnn'))
    reasons = tried_methods(pair)
    assert {n for n, r in reasons.items() if not r} >= set(FEATURES)


def test_numbers_by_level_stay_with_their_levels():
    pair = Pair(config('faster_rcnn'), config('retinanet'))
    options, _ = chosen(pair, 'fbkd')
    # Published for strides 4 to 32, of which the teacher has no 4.
    assert options['fbkd']['levels'] == [1, 2, 3]
    assert options['fbkd']['pooling'] == [8, 4, 4]
    assert options['fbkd']['reduction'] == [4, 2, 2]


@pytest.mark.parametrize(
    ('ours', 'theirs', 'layer'), [(4, 4, 3), (2, 4, 1), (4, 3, 2), (1, 4, 0)]
)
def test_the_layer_of_towers_of_other_depths(ours, theirs, layer):
    pair = []
    for depth in (ours, theirs):
        cfg = load_config(f'mmdet::{KINDS["gfl"]}')
        cfg.model = small_model(cfg.model)
        cfg.model.bbox_head.stacked_convs = depth
        pair.append(cfg)
    options, why = chosen(Pair(*pair), 'crosskd')
    assert options['crosskd']['layer'] == layer
    assert len(why) == (layer != 3)


def test_methods_that_do_not_fit():
    pair = Pair(config('c4'), config('retinanet'))
    with pytest.raises(ConfigError) as caught:
        chosen(pair, 'pkd', 'ld')
    text = str(caught.value)
    assert text.startswith('ld cannot distil this pair. ld: LD ')
    fit = text.partition('Methods that fit: ')[2]
    assert set(FEATURES) <= set(fit.rstrip('.').split(', '))


def test_two_that_steer():
    pair = Pair(config('gfl'), config('gfl'))
    with pytest.raises(ConfigError, match='steer the student'):
        chosen(pair, 'lad', 'solad')


def test_no_stride_in_common():
    deep = load_config(f'mmdet::{KINDS["detr"]}')
    deep.model = small_model(deep.model)
    fine = load_config(f'mmdet::{KINDS["faster_rcnn"]}')
    fine.model = small_model(fine.model)
    fine.model.neck.num_outs = 2  # strides 4 and 8
    fine.model.neck.end_level = 1
    fine.model.rpn_head.anchor_generator.strides = [4, 8]
    options, why = chosen(Pair(deep, fine), 'cwd')
    assert options['cwd']['resize']
    assert options['cwd']['teacher_levels'] == [1]
    assert 'no stride is in both' in why[0]
