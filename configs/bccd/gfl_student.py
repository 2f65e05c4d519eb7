# A quarter of the teacher's width, half of its epochs.
_base_ = ['../_base_/bccd_gfl.py']

model = dict(
    backbone=dict(base_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=32),
    bbox_head=dict(
        in_channels=32,
        feat_channels=32,
        norm_cfg=dict(num_groups=4),  # of 8 channels each, as in the teacher
    ),
)
