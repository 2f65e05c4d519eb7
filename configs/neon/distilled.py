# The student, distilled. Train the teacher first:
# mmkd train mmkd::neon/teacher.py --work-dir work_dirs/demo/teacher
_base_ = ['./student.py']

distillation = dict(
    teacher=dict(
        config='mmkd::neon/teacher.py',
        checkpoint='work_dirs/demo/teacher/epoch_18.pth',
    ),
    methods=dict(frcnn=dict(type='mmkd.FasterRCNNDistillation')),
)
