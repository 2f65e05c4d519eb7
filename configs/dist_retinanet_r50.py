# DIST (Huang et al., NeurIPS 2022), RetinaNet X101 -> R50, COCO 2x: 39.8 AP in
# the paper (the student alone: 37.4). Teacher, schedule and options are those
# of the authors' config (hunto/MasKD, mmrazor/configs/distill/dist).
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_2x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    # Its config and weights are in MMDetection's model index (41.0 AP).
    teacher=dict(name='retinanet_x101-64x4d_fpn_1x_coco'),
    methods=dict(
        dist=dict(
            type='mmkd.DIST',
            beta=1.0,  # between classes
            gamma=1.0,  # within a class
            temperature=1.0,
            dense='maps',  # all positions, level by level
        )
    ),
)
