# The student, distilled. Train the teacher first:
# mmkd train mmkd::neon/teacher.py --work-dir work_dirs/demo/teacher
_base_ = ['./student.py']

distillation = dict(
    teacher=dict(
        config='mmkd::neon/teacher.py',
        checkpoint='work_dirs/demo/teacher/epoch_6.pth',
    ),
    methods=dict(
        # all options: the defaults of the class
        fgd=dict(type='mmkd.FGD'),
        # after the first of the towers' two layers; the paper has 3 of 4
        crosskd=dict(type='mmkd.CrossKD', layer=1),
    ),
)
