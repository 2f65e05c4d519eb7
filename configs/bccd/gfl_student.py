# A quarter of the teacher's width, 12 of its 18 epochs.
_base_ = ['./gfl_teacher.py']

model = dict(
    backbone=dict(base_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=32),
    bbox_head=dict(
        in_channels=32,
        feat_channels=32,
        norm_cfg=dict(num_groups=4),  # of 8 channels, as the teacher's
    ),
)
train_cfg = dict(max_epochs=12, val_interval=12)
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=100
    ),
    dict(type='MultiStepLR', by_epoch=True, milestones=[9, 11], gamma=0.1),
]
