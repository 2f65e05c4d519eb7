# GFL on BCCD, with a ResNet-18 of half width: a narrow version of
# mmdet::gfl/gfl_r50_fpn_1x_coco.py with towers of two layers. The neck has
# norms. Without them its coarsest levels, which hold no object at 320x240,
# grow without bound when trained from scratch, and so do the losses of methods
# that compare features as they are.
_base_ = ['./bccd_one_stage.py', './schedule_bccd_adamw.py', './bccd.py']

runner_type = 'mmkd.DistillationRunner'
model = dict(
    type='GFL',
    neck=dict(norm_cfg=dict(type='BN', requires_grad=True)),
    bbox_head=dict(
        type='GFLHead',
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0),
        loss_dfl=dict(type='DistributionFocalLoss', loss_weight=0.25),
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
        reg_max=16,
    ),
    train_cfg=dict(assigner=dict(type='ATSSAssigner', topk=9)),
)
