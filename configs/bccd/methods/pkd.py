# PKD (Cao et al., NeurIPS 2022): narrow GFL on BCCD.
# Train the teacher first: mmkd train mmkd::bccd/gfl_teacher.py
# --work-dir work_dirs/bccd/gfl_teacher
_base_ = ['../gfl_student.py']

distillation = dict(
    teacher=dict(
        config='mmkd::bccd/gfl_teacher.py',
        checkpoint='work_dirs/bccd/gfl_teacher/epoch_16.pth',
    ),
    # the weight of Faster R-CNN; none is published for GFL
    methods=dict(pkd=dict(type='mmkd.PKD', loss_weight=6.0)),
)
