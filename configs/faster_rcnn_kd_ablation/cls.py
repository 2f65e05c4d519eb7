# Table 4: soft labels, equal weights for all classes (PASCAL 54.7 -> 57.4).
_base_ = ['../faster_rcnn_kd_r18_voc.py']

distillation = dict(
    methods=dict(
        frcnn=dict(
            soft=dict(
                type='mmkd.WeightedSoftCrossEntropyLoss',
                background_weight=1.0,
            ),
            bounded=None,
            hint=None,
        )
    )
)
