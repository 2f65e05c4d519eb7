# Dense cross-layer mutual distillation (Yao & Sun, ECCV 2020): RetinaNet R50
# and R101, each with auxiliary heads on two earlier stages, COCO 1x. All
# weights and T are 1, as in the paper, which has no detectors.
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    peers=dict(
        r101=dict(config='mmdet::retinanet/retinanet_r101_fpn_1x_coco.py')
    ),
    methods=dict(
        dcm=dict(
            type='mmkd.DCM', stages=['backbone.layer2', 'backbone.layer3']
        )
    ),
)
