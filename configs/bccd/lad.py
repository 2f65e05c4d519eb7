# Label-assignment distillation, big -> small PAA. Train the teacher first:
# mmkd train mmkd::bccd/paa_big.py --work-dir work_dirs/bccd/paa_big
_base_ = ['./paa_small.py']

distillation = dict(
    teacher=dict(
        config='mmkd::bccd/paa_big.py',
        checkpoint='work_dirs/bccd/paa_big/epoch_8.pth',
    ),
    methods=dict(lad=dict(type='mmkd.LAD', box_weighting='none')),
)
custom_hooks = []
