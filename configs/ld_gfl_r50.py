# LD in full (Zheng et al., CVPR 2022), GFL R101 -> R50, COCO 1x: the classes
# and the boxes in the main region, and the boxes in the valuable region.
_base_ = ['mmdet::gfl/gfl_r50_fpn_1x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    # Its config and weights are in MMDetection's model index (44.7 AP). The
    # student alone: 40.1, distilled: 42.1 (published; with the main region's
    # boxes alone 41.1, see ld_gfl_r50_main.py).
    teacher=dict(name='gfl_r101_fpn_ms-2x_coco'),
    methods=dict(
        ld=dict(
            type='mmkd.LD',
            # from the official config and code, which gave 42.1
            temperature=10.0,
            main_weight=0.25,
            vlr_weight=0.25,
            vlr_overlap='iof',  # the paper writes 'iou'
            gamma=0.25,  # the valuable region, from a quarter of the threshold
            kd_weight=10.0,
            kd_temperature=2.0,
            normalize=False,  # sums over the batch of each process
        )
    ),
)
