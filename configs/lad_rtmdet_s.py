# Label-assignment distillation for RTMDet, l -> s.
_base_ = ['mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    teacher=dict(name='rtmdet_l_8xb32-300e_coco'),
    methods=dict(lad=dict(type='mmkd.LAD')),
)
