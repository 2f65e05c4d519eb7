# LAD from a smaller teacher: PAA R50 -> R101, COCO 1x (42.6 -> 43.3 AP).
_base_ = ['mmdet::paa/paa_r101_fpn_1x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    teacher=dict(name='paa_r50_fpn_1x_coco'),
    methods=dict(lad=dict(type='mmkd.LAD', box_weighting='none')),
)
