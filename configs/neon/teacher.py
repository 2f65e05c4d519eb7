# Faster R-CNN with a ResNet-18 of half width: the demo's teacher.
_base_ = [
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    '../_base_/neon.py',
]

runner_type = 'mmkd.DistillationRunner'
model = dict(
    backbone=dict(
        depth=18,
        base_channels=32,
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,  # no download: trained from scratch
    ),
    # Half of the crowns are smaller than 35 pixels, few are smaller than 17.
    # Strides from 8 and anchors from 32 pixels suffice, and are faster than
    # strides from 4.
    neck=dict(
        in_channels=[32, 64, 128, 256],
        out_channels=64,
        start_level=1,
        num_outs=3,
    ),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[4], strides=[8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=64,
            featmap_strides=[8, 16, 32],
            roi_layer=dict(sampling_ratio=2),
        ),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=1),
    ),
    # A tile has about 9 trees, so there are fewer proposals and RoIs than on
    # COCO (RoIAlign is slow on a CPU). Up to half of them, not a quarter, are
    # trees.
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=300, max_per_img=150),
        rcnn=dict(sampler=dict(num=32, pos_fraction=0.5)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=250, max_per_img=100)),
)
