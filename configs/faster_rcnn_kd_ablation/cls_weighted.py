# Table 4: soft labels, weight 1.5 for background (PASCAL 54.7 -> 57.7).
_base_ = ['../faster_rcnn_kd_r18_voc.py']

distillation = dict(
    methods=dict(
        frcnn=dict(
            bounded=None,
            hint=None,
        )
    )
)
