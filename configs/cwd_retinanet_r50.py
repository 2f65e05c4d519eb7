# CWD (Shu et al., ICCV 2021), RetinaNet X101 -> R50, COCO 2x.
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_2x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    # 41.0 AP; the student alone: 37.4, distilled by CWD: 40.5 (published)
    teacher=dict(name='retinanet_x101-64x4d_fpn_1x_coco'),
    methods=dict(
        cwd=dict(
            type='mmkd.CWD',
            # from the config of that figure (pppppM/mmdetection-distiller);
            # MMRazor has all five levels and the weight 10, without a figure
            levels=[0, 1, 2, 3],
            temperature=1.0,
            loss_weight=5.0,
        )
    ),
)
