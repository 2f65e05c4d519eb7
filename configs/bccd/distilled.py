# The student, distilled (Chen et al., NeurIPS 2017). Train the teacher first:
# mmkd train mmkd::bccd/teacher.py --work-dir work_dirs/bccd/teacher
_base_ = ['./student.py']

distillation = dict(
    teacher=dict(
        config='mmkd::bccd/teacher.py',
        checkpoint='work_dirs/bccd/teacher/epoch_18.pth',
    ),
    methods=dict(frcnn=dict(type='mmkd.FasterRCNNDistillation')),
)
