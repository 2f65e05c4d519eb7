"""Teachers that give boxes alone, and a method that reads them."""

import copy

import numpy as np
from mmdet.registry import DATASETS
from mmdet.utils import register_all_modules
from mmengine.registry import DefaultScope

import mmkd
from tests.helpers import made_data

FIRST = (
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
)
LAST = dict(type='PackDetInputs')


@mmkd.METHODS.register_module()
class ReadBoxes(mmkd.Method):
    """Trains nothing, and keeps what it has read; for tests."""

    needs = ('detections',)
    student_paths = ('neck',)

    def forward(self, student, teacher, batch):
        self.read = [copy.deepcopy(found) for found in teacher.detections]
        energy = student.features('neck')[0].square().mean()
        count = sum(len(found) for found in self.read)
        return {'energy': energy * count}


def dataset_of(*steps, split='train', pipeline=None, **options):
    """COCO's data set of the tests' photos, with these transforms."""
    register_all_modules(init_default_scope=False)
    cfg = dict(
        type='CocoDataset',
        data_root=str(made_data.root() / 'coco_tiny'),
        ann_file=f'annotations/instances_{split}2017.json',
        data_prefix=dict(img=f'{split}2017/'),
        filter_cfg=dict(filter_empty_gt=True, min_size=1),
        pipeline=pipeline or [*FIRST, *copy.deepcopy(steps), LAST],
    )
    with DefaultScope.overwrite_default_scope('mmdet'):
        return DATASETS.build({**cfg, **options})


def raw_boxes(info):
    """The ground truth of an image in pixels of its file, (N, 4), xyxy.

    Crowds are left out.
    """
    objects = [each for each in info['instances'] if not each['ignore_flag']]
    boxes = [each['bbox'] for each in objects]
    return np.array(boxes, np.float32).reshape(-1, 4)
