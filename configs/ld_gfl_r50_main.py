# LD in the main region alone (Zheng et al., CVPR 2022), GFL R101 -> R50, COCO
# 1x. The student alone: 40.1, distilled: 41.1 AP (published).
_base_ = ['./ld_gfl_r50.py']

distillation = dict(methods=dict(ld=dict(vlr_weight=0.0, kd_weight=0.0)))
