# PKD (Cao et al., NeurIPS 2022), RetinaNet X101 -> R50, COCO 2x.
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_2x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    # 41.0 AP; the student alone: 37.4, distilled by PKD: 40.8 (published)
    teacher=dict(name='retinanet_x101-64x4d_fpn_1x_coco'),
    methods=dict(
        pkd=dict(
            type='mmkd.PKD',
            levels=[0, 1, 2, 3],  # as in the official config: P3 to P6
            loss_weight=10.0,  # as for RepPoints; for Faster R-CNN it is 6
        )
    ),
)
