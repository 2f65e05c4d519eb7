# One teacher, two students that also learn from each other (ISBI 2022): GFL
# R101 teaches two GFL R50, and all three train together, COCO 1x. Neither T
# nor the weights are published. The students are evaluated as an ensemble.
_base_ = ['mmdet::gfl/gfl_r50_fpn_1x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    # A trained, frozen teacher has checkpoint=... or name=..., no trainable.
    teacher=dict(
        config='mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py', trainable=True
    ),
    peers=dict(second=dict(config='mmdet::gfl/gfl_r50_fpn_1x_coco.py')),
    methods=dict(
        several=dict(
            type='mmkd.OneTeacherSeveralStudents',
            alpha=1.0,
            beta=1.0,
            temperature=1.0,
        )
    ),
)
custom_hooks = [
    dict(type='mmkd.EnsembleValidationHook', members=['student', 'second'])
]
