# The soft-label baseline of LAD, big -> small PAA.
_base_ = ['./lad.py']

distillation = dict(
    methods=dict(_delete_=True, soft=dict(type='mmkd.SoftLabelDistillation'))
)
custom_hooks = [dict(type='mmkd.BatchedPAAHook')]
