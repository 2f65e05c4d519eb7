# DKD (Zhao et al., CVPR 2022), Faster R-CNN R101 -> R50, COCO 1x (the student
# alone: 37.4 AP).
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    # Its config and weights are in MMDetection's model index (39.8 AP).
    teacher=dict(name='faster-rcnn_r101_fpn_2x_coco'),
    methods=dict(
        dkd=dict(
            type='mmkd.DKD',
            # from the official code for detectors; most of the paper's
            # classifiers have 1, 8 and 4
            alpha=1.0,
            beta=0.25,
            temperature=1.0,
        )
    ),
)
