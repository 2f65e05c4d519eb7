# Co-learning: the small and the big PAA train together.
_base_ = ['./paa_small.py']

distillation = dict(
    peers=dict(big=dict(config='mmkd::bccd/paa_big.py')),
    methods=dict(
        colad=dict(type='mmkd.CoLAD', box_weighting='none'),
    ),
)
custom_hooks = []
