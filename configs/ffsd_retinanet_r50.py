# FFSD (Li et al., arXiv 2103.14473): two RetinaNet R50 are fused, and the
# leader, a third one and the only one meant for use, learns from the fusion,
# COCO 1x (alone: 36.5 AP). T = 2, the weights and the ramp over 5 epochs are
# the paper's for classification, where the modules have an optimiser of their
# own. No figures of detectors are published.
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    peers=dict(
        first=dict(config='mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'),
        second=dict(config='mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'),
    ),
    methods=dict(
        ffsd=dict(
            type='mmkd.FFSD',
            temperature=2.0,
            feature_weight=10.0,
            diversity_weight=1e-5,
            module_weight=1000.0,
            ramp_epochs=5,
            decoder_input='fused',
        )
    ),
)
