# Label-assignment distillation for DDOD, R50 -> R18, COCO 1x.
_base_ = ['mmdet::ddod/ddod_r50_fpn_1x_coco.py']

runner_type = 'mmkd.DistillationRunner'
model = dict(
    backbone=dict(
        depth=18,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet18'),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
distillation = dict(
    teacher=dict(name='ddod_r50_fpn_1x_coco'),
    methods=dict(lad=dict(type='mmkd.LAD')),
)
