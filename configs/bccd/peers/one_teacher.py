# One teacher and two students that also learn from each other, all trained
# together. With alpha=0 only mutual learning remains, with beta=0 only
# distillation.
_base_ = ['../gfl_student.py']

distillation = dict(
    teacher=dict(config='mmkd::bccd/gfl_teacher.py', trainable=True),
    peers=dict(second=dict(config='mmkd::bccd/gfl_student.py')),
    methods=dict(
        several=dict(
            type='mmkd.OneTeacherSeveralStudents',
            alpha=1.0,
            beta=1.0,
            temperature=1.0,
        )
    ),
)
custom_hooks = [
    dict(type='mmkd.EnsembleValidationHook', members=['student', 'second'])
]
