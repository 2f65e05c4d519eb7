# LAD and soft labels together, big -> small PAA.
_base_ = ['./lad.py']

distillation = dict(methods=dict(lad=dict(type='mmkd.SoLAD')))
