# Table 4: hints with adaptation layers (PASCAL 54.7 -> 58.0).
_base_ = ['../faster_rcnn_kd_r18_voc.py']

distillation = dict(
    methods=dict(
        frcnn=dict(
            soft=None,
            bounded=None,
        )
    )
)
