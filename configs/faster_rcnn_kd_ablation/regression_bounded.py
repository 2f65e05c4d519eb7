# Table 4: the teacher bounds the regression (PASCAL 54.7 -> 55.9).
_base_ = ['../faster_rcnn_kd_r18_voc.py']

distillation = dict(
    methods=dict(
        frcnn=dict(
            soft=None,
            hint=None,
        )
    )
)
