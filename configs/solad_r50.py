# LAD and soft labels together, PAA R101 -> R50, COCO 1x (40.4 -> 42.4 AP).
# box_weighting='none' of the base is also that of SoLAD's official code.
_base_ = ['./lad_r50.py']

distillation = dict(methods=dict(lad=dict(type='mmkd.SoLAD')))
