# Pseudo labels (Xu et al., ICCV 2021) on COCO's unlabeled2017 beside its
# labels, RetinaNet R101 -> R50, COCO 1x (the student alone: 36.5 AP). No paper
# gives these settings; the threshold is SoftTeacher's.
#
# A step has 2 labelled images and 2 without labels. Download
# unlabeled2017.zip (123,403 images) to data/coco. PKD learns from both.
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    teacher=dict(name='retinanet_r101_fpn_2x_coco'),  # 38.9 AP
    methods=dict(
        pseudo=dict(type='mmkd.PseudoLabels', score_thr=0.9),
        pkd=dict(type='mmkd.PKD', levels=[0, 1, 2, 3], loss_weight=10.0),
    ),
    unlabelled=dict(
        dataset='data/coco/unlabeled2017', batch_size=2, weight=1.0
    ),
)
