# Label-assignment distillation for YOLOX, l -> s.
_base_ = ['mmdet::yolox/yolox_s_8xb8-300e_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    teacher=dict(name='yolox_l_8x8_300e_coco'),
    methods=dict(lad=dict(type='mmkd.LAD')),
)
