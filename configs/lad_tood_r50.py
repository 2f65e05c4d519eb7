# Label-assignment distillation for TOOD, R101 (2x, multi-scale) -> R50, 1x.
_base_ = ['mmdet::tood/tood_r50_fpn_1x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    teacher=dict(name='tood_r101_fpn_ms-2x_coco'),
    methods=dict(lad=dict(type='mmkd.LAD')),
)
