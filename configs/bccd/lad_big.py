# LAD from a smaller teacher, small -> big PAA.
_base_ = ['./paa_big.py']

distillation = dict(
    teacher=dict(
        config='mmkd::bccd/paa_small.py',
        checkpoint='work_dirs/bccd/paa_small/epoch_8.pth',
    ),
    methods=dict(lad=dict(type='mmkd.LAD', box_weighting='none')),
)
custom_hooks = []
