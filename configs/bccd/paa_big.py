# PAA with a ResNet-18 of half width, towers of two layers: the big network.
_base_ = [
    '../_base_/bccd_one_stage.py',
    '../_base_/schedule_bccd_adamw.py',
    '../_base_/bccd.py',
]

runner_type = 'mmkd.DistillationRunner'
model = dict(
    type='PAA',
    bbox_head=dict(
        type='PAAHead',
        reg_decoded_bbox=True,
        score_voting=True,
        topk=9,
        bbox_coder=dict(
            type='DeltaXYWHBBoxCoder',
            target_means=[0.0, 0.0, 0.0, 0.0],
            target_stds=[0.1, 0.1, 0.2, 0.2],
        ),
        loss_cls=dict(
            type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25
        ),
        loss_bbox=dict(type='GIoULoss', loss_weight=1.3),
        loss_centerness=dict(
            type='CrossEntropyLoss', use_sigmoid=True, loss_weight=0.5
        ),
    ),
    train_cfg=dict(
        assigner=dict(
            type='MaxIoUAssigner',
            pos_iou_thr=0.1,
            neg_iou_thr=0.1,
            min_pos_iou=0,
            ignore_iof_thr=-1,
        )
    ),
)
# Stock PAA stops with an error from scikit-learn where costs are close.
custom_hooks = [dict(type='mmkd.BatchedPAAHook')]
