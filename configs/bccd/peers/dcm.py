# Dense cross-layer mutual distillation of two narrow GFL.
_base_ = ['../gfl_student.py']

distillation = dict(
    peers=dict(second=dict(config='mmkd::bccd/gfl_student.py')),
    methods=dict(
        dcm=dict(
            type='mmkd.DCM', stages=['backbone.layer2', 'backbone.layer3']
        )
    ),
)
custom_hooks = [dict(type='mmkd.EnsembleValidationHook')]
