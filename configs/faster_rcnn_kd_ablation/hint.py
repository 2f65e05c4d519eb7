# Table 4: hints without adaptation layers (PASCAL 54.7 -> 56.9).
_base_ = ['../faster_rcnn_kd_r18_voc.py']

distillation = dict(
    methods=dict(
        frcnn=dict(
            soft=None,
            bounded=None,
            hint=dict(type='mmkd.FeatureHint', adapt=False, loss_weight=0.5),
        )
    )
)
