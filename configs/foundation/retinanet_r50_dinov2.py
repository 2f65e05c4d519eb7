# Foundation features (RT-DETRv4, Liao et al., 2025): RetinaNet R50 imitates
# the patch tokens of DINOv2 ViT-S/14, COCO 1x (the student alone: 36.5 AP).
# The paper's student is RT-DETR; no paper gives these settings.
#
# pip install mmkd[foundation]; transformers downloads the encoder (88 MB,
# Apache-2.0), or name the folder of one.
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    teacher=dict(
        type='mmkd.FoundationEncoder',
        name='facebook/dinov2-small',
        # Half of 1333, as in the paper: a patch is 28 pixels of the image,
        # and so is about a position of C5 (32).
        size=672,
    ),
    methods=dict(
        foundation=dict(
            type='mmkd.FoundationFeatures',
            source='backbone',  # C5, its last map
            loss_weight=5.0,  # at the start, as in RT-DETRv4-S
        )
    ),
)
custom_hooks = [
    # 11 +- 1 % of the gradient, as in RT-DETRv4-S
    dict(type='mmkd.GradientBalanceHook', share=0.11, tolerance=0.01)
]
