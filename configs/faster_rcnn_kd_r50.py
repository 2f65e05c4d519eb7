# Faster R-CNN distillation (Chen et al., NeurIPS 2017), R101 -> R50, COCO 1x.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    # Its config and weights are in MMDetection's model index (38.5 AP after
    # 12 epochs, 39.8 after 24; the student alone: 37.4).
    teacher=dict(name='faster-rcnn_r101_fpn_2x_coco'),
    methods=dict(
        frcnn=dict(
            type='mmkd.FasterRCNNDistillation',
            mu=0.5,  # hard : soft labels; the paper gives no value
            lambda_reg=1.0,  # sec. 3.1
            soft=dict(
                type='mmkd.WeightedSoftCrossEntropyLoss',
                background_weight=1.5,  # sec. 3.2
                temperature=1.0,
            ),
            bounded=dict(
                type='mmkd.TeacherBoundedRegressionLoss',
                margin=0.0,  # the paper gives no value
                loss_weight=0.5,  # nu, sec. 3.3
            ),
            hint=dict(type='mmkd.FeatureHint', loss_weight=0.5),  # gamma
        )
    ),
)
