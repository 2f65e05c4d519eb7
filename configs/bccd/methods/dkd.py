# DKD (Zhao et al., CVPR 2022): narrow GFL on BCCD.
# Train the teacher first: mmkd train mmkd::bccd/gfl_teacher.py
# --work-dir work_dirs/bccd/gfl_teacher
_base_ = ['../gfl_student.py']

distillation = dict(
    teacher=dict(
        config='mmkd::bccd/gfl_teacher.py',
        checkpoint='work_dirs/bccd/gfl_teacher/epoch_16.pth',
    ),
    # from the official code for detectors, which distils RoI heads
    methods=dict(
        dkd=dict(type='mmkd.DKD', alpha=1.0, beta=0.25, temperature=1.0)
    ),
)
