# PKD (Cao et al., NeurIPS 2022), Faster R-CNN R101 -> R50, COCO 2x.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    # 39.8 AP; the student alone: 38.4, distilled by PKD: 40.3 (published)
    teacher=dict(name='faster-rcnn_r101_fpn_2x_coco'),
    methods=dict(
        pkd=dict(
            type='mmkd.PKD',
            levels=[0, 1, 2, 3],  # as in the official config: P2 to P5
            loss_weight=6.0,  # for RetinaNet and RepPoints it is 10
        )
    ),
)
