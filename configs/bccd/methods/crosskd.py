# CrossKD (Wang et al., CVPR 2024): narrow GFL on BCCD.
# Train the teacher first: mmkd train mmkd::bccd/gfl_teacher.py
# --work-dir work_dirs/bccd/gfl_teacher
_base_ = ['../gfl_student.py']

distillation = dict(
    teacher=dict(
        config='mmkd::bccd/gfl_teacher.py',
        checkpoint='work_dirs/bccd/gfl_teacher/epoch_16.pth',
    ),
    # After the first of the towers' two layers; the paper has 3 of 4.
    methods=dict(crosskd=dict(type='mmkd.CrossKD', layer=1)),
)
