# 18 epochs of 26 iterations from scratch: SGD, warm-up, two steps.
_base_ = ['mmdet::_base_/default_runtime.py']

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=18, val_interval=9)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=100
    ),
    dict(type='MultiStepLR', by_epoch=True, milestones=[12, 16], gamma=0.1),
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.04, momentum=0.9, weight_decay=0.0001),
    clip_grad=dict(max_norm=35, norm_type=2),
)
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=13),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1),
)
