# FBKD (Zhang & Ma, ICLR 2021), Faster R-CNN R101 -> R50, COCO 1x.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    # 39.8 AP; the student alone: 37.4, distilled by FBKD: 39.3 (published)
    teacher=dict(name='faster-rcnn_r101_fpn_1x_coco'),
    methods=dict(
        fbkd=dict(
            type='mmkd.FBKD',
            # from MMRazor's config, to which that figure belongs: P2 to P5.
            # Its block pools by 2 before it pools by 8, 4, 2 and 2.
            levels=[0, 1, 2, 3],
            pooling=[16, 8, 4, 4],
            reduction=[4, 4, 2, 2],
            temperature=0.5,
            feature_weight=7e-5,
            attention_weight=4e-3,
            relation_weight=7e-5,
        )
    ),
)
