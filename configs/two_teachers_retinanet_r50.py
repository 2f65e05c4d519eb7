# KD (Hinton et al., 2015) from two teachers, RetinaNet R101 and X101 -> R50,
# COCO 2x (the student alone: 37.4 AP). No paper gives these settings.
#
# Both checkpoints come from MMDetection's model index. Each teacher has half
# of the method's weight: kd.loss_cls_r101, kd.loss_cls_x101. Teachers may have
# other classes; each teaches those that it shares with the student. Teachers
# of equal classes can also teach by the mean of their logits:
# teacher=dict(mean=[..., ...]).
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_2x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    teacher=[
        dict(name='retinanet_r101_fpn_2x_coco', label='r101'),  # 38.9 AP
        dict(name='retinanet_x101-64x4d_fpn_2x_coco', label='x101'),  # 40.8
    ],
    methods=dict(kd=dict(type='mmkd.KD', temperature=1.0)),
)
