# Deep mutual learning (Zhang et al., CVPR 2018): RetinaNet R50 and R101 train
# together, COCO 1x (alone: 36.5 and 38.5 AP). T and the weight are 1 in the
# paper. It has no detectors, so there are no published figures.
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    # Saved as work_dirs/dml_retinanet_r50/r101/epoch_12.pth, with its config.
    peers=dict(
        r101=dict(config='mmdet::retinanet/retinanet_r101_fpn_1x_coco.py')
    ),
    methods=dict(dml=dict(type='mmkd.DML', temperature=1.0)),
)
