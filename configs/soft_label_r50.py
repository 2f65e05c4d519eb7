# The soft-label baseline of LAD, PAA R101 -> R50, COCO 1x (40.4 -> 41.3 AP).
_base_ = ['./lad_r50.py']

distillation = dict(
    methods=dict(
        _delete_=True,
        soft=dict(
            type='mmkd.SoftLabelDistillation',
            task_loss=False,  # soft labels alone, as in the official code
        ),
    )
)
