# The same with the trained, frozen teacher. Train it first:
# tools/train.py configs/bccd/gfl_teacher.py --work-dir
# work_dirs/bccd/gfl_teacher
_base_ = ['./one_teacher.py']

distillation = dict(
    teacher=dict(
        config='configs/bccd/gfl_teacher.py',
        checkpoint='work_dirs/bccd/gfl_teacher/epoch_16.pth',
    ),
    peers=dict(
        _delete_=True,
        second=dict(config='configs/bccd/gfl_student.py'),
    ),
    methods=dict(several=dict(teacher=None)),
)
