"""Wrappers of detectors are refused, wherever a detector is expected."""

import pytest
from mmdet.models import DetTTAModel
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import MODELS
from torch import nn

from mmkd.core.distiller import build_distiller
from mmkd.detectors.wrappers import check_is_detector
from mmkd.errors import ConfigError
from tests.helpers import tiny_detectors as tiny
from tests.helpers import toy
from tests.helpers.tiny_wrappers import soft_teacher, tracker

HINT = dict(hint=dict(type='mmkd.FeatureHint'))


def gfl():
    return tiny.build(tiny.gfl())


WRAPPED = {
    'SoftTeacher': lambda: tiny.build(soft_teacher(tiny.gfl())),
    'ByteTrack': lambda: tiny.build(tracker(tiny.gfl())),
    'DetTTAModel': lambda: DetTTAModel(module=gfl()),
    'ExponentialMovingAverage': lambda: ExponentialMovingAverage(gfl()),
    'DataParallel': lambda: nn.DataParallel(gfl()),
}
PARTS = dict(SoftTeacher='student: GFL, teacher: GFL', ByteTrack='detector: G')


def teacher(model):
    return dict(config=dict(model=model), checkpoint=None)


@pytest.mark.parametrize('kind', WRAPPED)
def test_as_student(kind):
    part = PARTS.get(kind, 'module: GFL')
    with pytest.raises(
        ConfigError,
        match=rf'the student is {kind}, a wrapper .*\({part}.*such as GFL',
    ):
        build_distiller(
            dict(teacher=teacher(tiny.gfl()), methods=HINT),
            WRAPPED[kind](),
            tiny.CLASSES,
        )


@pytest.mark.parametrize('wrap', [soft_teacher, tracker])
def test_as_teacher_or_peer(wrap):
    for cfg, who in (
        (dict(teacher=teacher(wrap(tiny.gfl()))), 'teacher'),
        (
            dict(peers=dict(b=dict(config=dict(model=wrap(tiny.gfl()))))),
            'peer "b"',
        ),
    ):
        with pytest.raises(ConfigError, match=f'the {who} is .*a wrapper'):
            build_distiller(dict(methods=HINT, **cfg), gfl(), tiny.CLASSES)


def test_the_runner_says_so_before_anything_else(tmp_path):
    cfg = toy.distilled(tmp_path, toy.RETINANET)
    cfg.model = soft_teacher(cfg.model)
    cfg.train_dataloader.dataset.data_root = 'no/data/'
    with pytest.raises(ConfigError, match='the student is SoftTeacher'):
        toy.train(cfg)


def test_detectors_are_none(tmp_path):
    """Not even one with a teacher of MMDetection's own beside it."""
    for config in (tiny.gfl(), tiny.faster_rcnn(), tiny.mask_rcnn()):
        check_is_detector(tiny.build(config), 'student')
    student = tiny.gfl()
    student.type = 'KnowledgeDistillationSingleStageDetector'
    student.bbox_head.type = 'LDHead'
    kind = dict(type='KnowledgeDistillationKLDivLoss', T=10, loss_weight=0.25)
    student.bbox_head.loss_ld = kind
    student.teacher_config = dict(model=tiny.gfl())
    student._scope_ = 'mmdet'
    check_is_detector(MODELS.build(student), 'student')
