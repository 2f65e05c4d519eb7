# GFL with a ResNet-18 of half width: the one-stage teacher on BCCD. The model
# is that of mmdet::gfl/gfl_r50_fpn_1x_coco.py, narrow, towers of two layers.
_base_ = [
    '../_base_/bccd_one_stage.py',
    '../_base_/schedule_bccd_adamw.py',
    '../_base_/bccd.py',
]

runner_type = 'mmkd.DistillationRunner'
model = dict(
    type='GFL',
    bbox_head=dict(
        type='GFLHead',
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0),
        loss_dfl=dict(type='DistributionFocalLoss', loss_weight=0.25),
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
        reg_max=16,
    ),
    train_cfg=dict(assigner=dict(type='ATSSAssigner', topk=9)),
)
