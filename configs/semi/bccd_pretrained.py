# The same from a backbone that has seen all photos, without labels:
# mmkd pretrain mmkd::bccd/gfl_student.py --images data/bccd \
#     --work-dir work_dirs/semi/ntxent …, as studies/semi.yaml has it
_base_ = ['./bccd_labelled.py']

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/semi/ntxent/gfl_student_backbone.pth',
            prefix='backbone.',
        )
    )
)
