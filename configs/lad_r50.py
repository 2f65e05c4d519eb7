# Label-assignment distillation (Nguyen et al., WACV 2022), PAA R101 -> R50,
# COCO 1x: 40.4 -> 41.6 AP in the paper.
_base_ = ['mmdet::paa/paa_r50_fpn_1x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    # Its config and weights are in MMDetection's model index (42.6 AP).
    teacher=dict(name='paa_r101_fpn_1x_coco'),
    methods=dict(
        lad=dict(
            type='mmkd.LAD',
            box_weighting='none',  # as in the paper's official code
        )
    ),
)
