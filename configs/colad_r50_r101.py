# Co-learning (CoLAD, Nguyen et al., WACV 2022): PAA R50 and R101 train
# together on one shared assignment; each network's checkpoint is stock. The
# paper's 46.0 AP is that of another pair: see the docstring of mmkd.CoLAD.
_base_ = ['mmdet::paa/paa_r50_fpn_1x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    # Saved as work_dirs/colad_r50_r101/r101/epoch_12.pth, with its config.
    peers=dict(r101=dict(config='mmdet::paa/paa_r101_fpn_1x_coco.py')),
    methods=dict(
        colad=dict(
            type='mmkd.CoLAD',
            indicator='std_mean',
            box_weighting='none',  # as in the paper's official code
        )
    ),
)
