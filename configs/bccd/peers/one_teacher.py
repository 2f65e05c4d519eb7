# One teacher and two students that also learn from each other, all trained
# together. alpha=0 leaves mutual learning, beta=0 distillation alone.
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
