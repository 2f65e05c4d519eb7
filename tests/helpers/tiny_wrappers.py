"""Configs of models that wrap a detector."""


def soft_teacher(detector):
    return dict(
        type='SoftTeacher',
        detector=detector,
        data_preprocessor=dict(
            type='MultiBranchDataPreprocessor',
            data_preprocessor=detector['data_preprocessor'],
        ),
        semi_train_cfg=dict(freeze_teacher=True),
        semi_test_cfg=dict(predict_on='teacher'),
    )


def tracker(detector):
    preprocessor = {**detector['data_preprocessor']}
    preprocessor['type'] = 'TrackDataPreprocessor'
    return dict(
        type='ByteTrack', detector=detector, data_preprocessor=preprocessor
    )
