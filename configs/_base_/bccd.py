# BCCD: 364 microscope photos of blood cells (640x480, VOC layout), read at
# 320x240. Both VOC's mAP and COCO's metrics are computed on the test split.
classes = ('RBC', 'WBC', 'Platelets')
metainfo = dict(
    classes=classes, palette=[(220, 20, 60), (119, 11, 32), (0, 0, 142)]
)
scale = (320, 240)
meta_keys = (
    'img_id',
    'img_path',
    'ori_shape',
    'img_shape',
    'scale_factor',
    'flip',
    'flip_direction',
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    # CocoMetric reads the ground truth from `instances`, so it needs no JSON.
    dict(type='PackDetInputs', meta_keys=(*meta_keys, 'instances')),
]

train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    batch_sampler=dict(type='AspectRatioBatchSampler'),
    dataset=dict(
        type='VOCDataset',
        metainfo=metainfo,
        data_root='data/bccd/',
        ann_file='BCCD/ImageSets/Main/train.txt',
        data_prefix=dict(sub_data_root='BCCD/'),
        # A few boxes have no area, whose regression target would be log(0).
        filter_cfg=dict(filter_empty_gt=True, bbox_min_size=1),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='VOCDataset',
        metainfo=metainfo,
        data_root='data/bccd/',
        ann_file='BCCD/ImageSets/Main/val.txt',
        data_prefix=dict(sub_data_root='BCCD/'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='VOCDataset',
        metainfo=metainfo,
        data_root='data/bccd/',
        ann_file='BCCD/ImageSets/Main/test.txt',
        data_prefix=dict(sub_data_root='BCCD/'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
val_evaluator = [
    dict(type='CocoMetric', metric='bbox'),
    dict(type='VOCMetric', metric='mAP', eval_mode='area'),
]
test_evaluator = val_evaluator
