# The soft-label baseline of LAD, big -> small PAA: soft labels alone.
_base_ = ['./lad.py']

distillation = dict(
    methods=dict(
        _delete_=True,
        soft=dict(type='mmkd.SoftLabelDistillation', task_loss=False),
    )
)
