# A ResNet-18 of a quarter of its width, with half of the teacher's neck and
# head. No one offers ImageNet weights for it, so it starts from scratch.
_base_ = ['../_base_/neon_gfl.py']

model = dict(
    backbone=dict(
        type='ResNet',
        depth=18,
        base_channels=16,
        out_indices=(1, 2, 3),
        norm_eval=False,
    ),
    neck=dict(in_channels=[32, 64, 128], out_channels=32),
    bbox_head=dict(
        in_channels=32,
        feat_channels=32,
        norm_cfg=dict(type='GN', num_groups=4, requires_grad=True),
    ),
)
