# FBKD (Zhang and Ma, ICLR 2021): narrow GFL on BCCD.
# Train the teacher first: mmkd train mmkd::bccd/gfl_teacher.py
# --work-dir work_dirs/bccd/gfl_teacher
_base_ = ['../gfl_student.py']

distillation = dict(
    teacher=dict(
        config='mmkd::bccd/gfl_teacher.py',
        checkpoint='work_dirs/bccd/gfl_teacher/epoch_16.pth',
    ),
    # The cells of the original code, as the maps have 30x40 positions; all
    # other options: the defaults of the class
    methods=dict(fbkd=dict(type='mmkd.FBKD', pooling=[8, 4, 2])),
)
