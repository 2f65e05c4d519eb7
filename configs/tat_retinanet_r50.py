# TaT (Lin et al., CVPR 2022), RetinaNet R101 -> R50, COCO 2x.
# Its authors never tested detection: there is no figure to compare with.
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_2x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    teacher=dict(name='retinanet_r101_fpn_2x_coco'),
    methods=dict(
        tat=dict(
            type='mmkd.TaT',
            patch_size=[8, 8],  # no published value for detectors
            patches_per_group=4,
            anchor_grid=[16, 16],  # no published value for detectors
            patch_weight=0.6,  # delta and zeta: ResNet-18 on COCO-Stuff
            anchor_weight=0.6,
            theta='identity',  # the best in the paper
            per_image=True,  # as the authors' code for segmentation does
        )
    ),
)
