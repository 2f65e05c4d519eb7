# Faster R-CNN distillation (Chen et al., NeurIPS 2017), R50 -> R18, VOC 07+12.
_base_ = ['mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py']

model = dict(
    backbone=dict(
        depth=18,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet18'),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    teacher=dict(
        config='mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v2.0/'
        'pascal_voc/faster_rcnn_r50_fpn_1x_voc0712/'
        'faster_rcnn_r50_fpn_1x_voc0712_20220320_192712-54bef0f3.pth',
    ),
    # mu, lambda, nu, margin, gamma and weights: the defaults of the class
    methods=dict(frcnn=dict(type='mmkd.FasterRCNNDistillation')),
)
