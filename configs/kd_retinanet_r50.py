# KD of class logits (Hinton et al., 2015), RetinaNet R101 -> R50, COCO 2x
# (the student alone: 37.4 AP). No paper gives the settings for a detector.
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_2x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    # Its config and weights are in MMDetection's model index (38.9 AP).
    teacher=dict(name='retinanet_r101_fpn_2x_coco'),
    methods=dict(kd=dict(type='mmkd.KD', temperature=1.0)),
)
