# A quarter of the big network's width, with the same schedule.
_base_ = ['./paa_big.py']

model = dict(
    backbone=dict(base_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=32),
    bbox_head=dict(
        in_channels=32,
        feat_channels=32,
        norm_cfg=dict(num_groups=4),  # of 8 channels, as in the big one
    ),
)
