# LD (Zheng et al., CVPR 2022): narrow GFL on BCCD.
# Train the teacher first: mmkd train mmkd::bccd/gfl_teacher.py
# --work-dir work_dirs/bccd/gfl_teacher
_base_ = ['../gfl_student.py']

distillation = dict(
    teacher=dict(
        config='mmkd::bccd/gfl_teacher.py',
        checkpoint='work_dirs/bccd/gfl_teacher/epoch_16.pth',
    ),
    # The sums grow with the objects in a batch: about 3 * 7 in the paper's
    # configs and 8 * 13 here. The weights are a fifth of its 0.25.
    methods=dict(
        ld=dict(
            type='mmkd.LD',
            temperature=10.0,
            main_weight=0.05,
            vlr_weight=0.05,
            normalize=False,
        )
    ),
)
