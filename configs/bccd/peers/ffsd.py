# FFSD (Li et al., arXiv 2103.14473): two common students are fused, and the
# leader, the only network that is meant for use, learns from the fusion. T =
# 2, the weights and the ramp over 5 epochs are the paper's for classification,
# where the modules have an optimiser of their own.
_base_ = ['../gfl_student.py']

distillation = dict(
    peers=dict(
        first=dict(config='mmkd::bccd/gfl_student.py'),
        second=dict(config='mmkd::bccd/gfl_student.py'),
    ),
    methods=dict(
        ffsd=dict(
            type='mmkd.FFSD',
            temperature=2.0,
            feature_weight=10.0,
            diversity_weight=1e-5,
            module_weight=1000.0,
            ramp_epochs=5,
            decoder_input='fused',
        )
    ),
)
