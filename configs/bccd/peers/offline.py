# The same with the trained, frozen teacher. Train it first:
# mmkd train mmkd::bccd/gfl_teacher.py --work-dir
# work_dirs/bccd/gfl_teacher
_base_ = ['./one_teacher.py']

distillation = dict(
    teacher=dict(
        checkpoint='work_dirs/bccd/gfl_teacher/epoch_16.pth', trainable=False
    )
)
