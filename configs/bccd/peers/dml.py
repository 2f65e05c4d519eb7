# Deep mutual learning: two narrow GFL that differ in their initialisation.
_base_ = ['../gfl_student.py']

distillation = dict(
    peers=dict(second=dict(config='mmkd::bccd/gfl_student.py')),
    methods=dict(dml=dict(type='mmkd.DML', temperature=1.0)),
)
custom_hooks = [dict(type='mmkd.EnsembleValidationHook')]
