# GFL with a ResNet-18 of half width: the one-stage teacher on BCCD. It trains
# twice as long as the students.
_base_ = ['../_base_/bccd_gfl.py']

train_cfg = dict(max_epochs=16, val_interval=16)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=50),
    dict(type='MultiStepLR', by_epoch=True, milestones=[12, 14], gamma=0.1),
]
