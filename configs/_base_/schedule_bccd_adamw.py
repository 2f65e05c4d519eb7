# 8 epochs of 26 iterations from scratch. With SGD, dense heads learn the rare
# class late, and with some seeds not at all. The rate was chosen for the small
# PAA alone, on the validation split; GFL uses it as well.
_base_ = ['mmdet::_base_/default_runtime.py']

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=8, val_interval=8)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=50),
    dict(type='MultiStepLR', by_epoch=True, milestones=[6, 7], gamma=0.1),
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.003, weight_decay=0.05),
    clip_grad=dict(max_norm=35, norm_type=2),
)
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=13),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1),
)
