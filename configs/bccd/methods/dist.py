# DIST (Huang et al., NeurIPS 2022): narrow GFL on BCCD, with the options of
# the authors' code for detection.
# Train the teacher first: mmkd train mmkd::bccd/gfl_teacher.py
# --work-dir work_dirs/bccd/gfl_teacher
_base_ = ['../gfl_student.py']

distillation = dict(
    teacher=dict(
        config='mmkd::bccd/gfl_teacher.py',
        checkpoint='work_dirs/bccd/gfl_teacher/epoch_16.pth',
    ),
    methods=dict(dist=dict(type='mmkd.DIST', beta=1.0, gamma=1.0)),
)
