# Table 4: plain L2 towards the teacher's boxes (PASCAL 54.7 -> 54.6).
_base_ = ['../faster_rcnn_kd_r18_voc.py']

distillation = dict(
    methods=dict(
        frcnn=dict(
            soft=None,
            bounded=dict(
                type='mmkd.TeacherBoundedRegressionLoss', bounded=False
            ),
            hint=None,
        )
    )
)
