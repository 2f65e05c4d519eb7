# TaT (Lin et al., CVPR 2022): narrow GFL on BCCD.
# Train the teacher first: mmkd train mmkd::bccd/gfl_teacher.py
# --work-dir work_dirs/bccd/gfl_teacher
_base_ = ['../gfl_student.py']

distillation = dict(
    teacher=dict(
        config='mmkd::bccd/gfl_teacher.py',
        checkpoint='work_dirs/bccd/gfl_teacher/epoch_16.pth',
    ),
    # Statistics of the batch, with which the results were measured; all other
    # options: the defaults of the class
    methods=dict(tat=dict(type='mmkd.TaT', per_image=False)),
)
