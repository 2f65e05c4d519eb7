# TeacherBoxes: a teacher's confident boxes that no annotator has drawn become
# objects, Faster R-CNN R101 -> R50, COCO 1x (the student alone: 37.4 AP). No
# paper gives these settings; COCO's labels are nearly whole, so that it is for
# data with missing ones.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py']

runner_type = 'mmkd.DistillationRunner'
distillation = dict(
    teacher=dict(name='faster-rcnn_r101_fpn_2x_coco'),  # 39.8 AP
    methods=dict(
        boxes=dict(
            type='mmkd.TeacherBoxes',
            score_thr=0.7,  # from here on, an object that weighs its score
            doubtful_thr=0.3,  # from here on, a region to ignore
        )
    ),
)
