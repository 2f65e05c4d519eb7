# The student, distilled from the teacher after `tools/train.py teacher.py`.
_base_ = ['./student.py']

distillation = dict(
    teacher=dict(
        config='configs/neon/teacher.py',
        checkpoint='work_dirs/demo/teacher/epoch_18.pth',
    ),
    methods=dict(frcnn=dict(type='mmkd.FasterRCNNDistillation')),
)
