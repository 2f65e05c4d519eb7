# Tree crowns from the air: tiles of 256 x 256 pixels in COCO's layout, made by
# `mmkd prepare neon`. Data, schedule and metrics of the demo are
# the same for its three networks.
_base_ = ['mmdet::_base_/default_runtime.py']

classes = ('Tree',)
metainfo = dict(classes=classes, palette=[(0, 158, 115)])
dataset_type = 'CocoDataset'
data_root = 'data/neon/'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    # Seen from above, a tree has no upside, so all flips are equally likely.
    dict(
        type='RandomFlip',
        prob=[0.25, 0.25, 0.25],
        direction=['horizontal', 'vertical', 'diagonal'],
    ),
    # The photos are few, so every epoch shows them otherwise.
    dict(
        type='RandomResize',
        scale=(256, 256),
        ratio_range=(0.8, 1.25),
        keep_ratio=True,
    ),
    dict(type='RandomCrop', crop_size=(256, 256), allow_negative_crop=True),
    dict(type='Pad', size=(256, 256)),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    # It changes nothing, but the detectors need its scale factor.
    dict(type='Resize', scale=(256, 256)),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs'),
]

train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        metainfo=metainfo,
        data_root=data_root,
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        metainfo=metainfo,
        data_root=data_root,
        ann_file='annotations/val.json',
        data_prefix=dict(img='val/'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type='CocoMetric',
    ann_file=data_root + 'annotations/val.json',
    metric='bbox',
)
test_evaluator = val_evaluator

# 8 epochs of 56 iterations from scratch: AdamW, warm-up, cosine. Rate and
# batch were chosen for the plain student (docs/results.md).
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=8, val_interval=8)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=56),
    dict(
        type='CosineAnnealingLR',
        T_max=8,
        eta_min_ratio=0.01,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.002, weight_decay=0.05),
    clip_grad=dict(max_norm=35, norm_type=2),
)
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=14),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1),
)
randomness = dict(seed=0)
