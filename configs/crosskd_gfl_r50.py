# CrossKD (Wang et al., CVPR 2024), GFL R101 -> R50, COCO 1x:
# 40.2 -> 43.7 AP in the paper. The features are aligned as in its official
# code, which is the default.
_base_ = ['mmdet::gfl/gfl_r50_fpn_1x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    # Its config and weights are in MMDetection's model index (44.7 AP).
    teacher=dict(name='gfl_r101_fpn_ms-2x_coco'),
    methods=dict(
        crosskd=dict(
            type='mmkd.CrossKD',
            layer=3,  # of 4
            cls_weight=1.0,
            box_weight=4.0,  # weight of the divergence of bins
        )
    ),
)
