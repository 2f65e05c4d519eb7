# MobileNetV2 from ImageNet (mmkd prepare mobilenet_v2): the demo's teacher.
_base_ = ['../_base_/neon_gfl.py']

model = dict(
    backbone=dict(
        type='MobileNetV2',
        out_indices=(2, 4, 6),
        frozen_stages=2,  # edges and colours are the same from the air
        init_cfg=dict(
            type='Pretrained', checkpoint='data/mobilenet_v2/imagenet.pth'
        ),
    ),
    neck=dict(in_channels=[32, 96, 320], out_channels=64),
    # 8 channels per group, as in the stock heads of 256
    bbox_head=dict(
        in_channels=64,
        feat_channels=64,
        norm_cfg=dict(type='GN', num_groups=8, requires_grad=True),
    ),
)

# It starts from weights that know much already: fewer epochs than from
# scratch, and half of the rate.
train_cfg = dict(max_epochs=6, val_interval=6)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=56),
    dict(
        type='CosineAnnealingLR',
        T_max=6,
        eta_min_ratio=0.01,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
optim_wrapper = dict(optimizer=dict(lr=0.001))
