"""The contract that only detectors/ knows MMDetection's heads."""

import pytest

pytest.importorskip('importlinter')
from tools.contracts import knowledge


@pytest.mark.parametrize(
    ('source', 'expected'),
    [
        ('x = model.bbox_head', 'reads .bbox_head'),
        ("x = getattr(model, 'roi_head', None)", "reads 'roi_head'"),
        (
            'from mmdet.models.dense_heads import PAAHead',
            'imports mmdet.models.dense_heads.PAAHead',
        ),
        (
            'from mmdet.models import detectors',
            'imports mmdet.models.detectors',
        ),
        ('import mmdet.models.roi_heads', 'imports mmdet.models.roi_heads'),
    ],
)
def test_knowledge(source, expected):
    assert knowledge(source) == [(1, expected)]


@pytest.mark.parametrize(
    'source',
    [
        "path = 'bbox_head.cls_convs.0'",
        "cfg['bbox_head']",
        'self.bbox_head = fresh',
        'from mmdet.models.losses import GIoULoss',
    ],
)
def test_no_knowledge(source):
    assert knowledge(source) == []
