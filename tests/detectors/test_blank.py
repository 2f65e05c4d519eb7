"""How many channels a detector reads, and its pass on a blank image."""

import pytest
import torch

from mmkd.core.distiller import build_distiller
from mmkd.detectors.blank import blank_pass, image_channels
from mmkd.detectors.shrink import small_model
from mmkd.errors import ConfigError
from mmkd.teachers.probe import probe
from mmkd.teachers.renormalize import Renormalize
from tests.helpers import tiny_detectors as tiny
from tests.helpers import toy

PREPROCESSORS = {
    1: dict(mean=[110.0], std=[55.0], bgr_to_rgb=False),
    3: {},
    4: dict(mean=None, std=None, bgr_to_rgb=False),
}


def of_channels(channels, **changes):
    return tiny.build(
        tiny.retinanet(
            backbone__in_channels=channels,
            data_preprocessor=PREPROCESSORS[channels] | changes,
        )
    )


def batch_of(model, channels):
    raw = tiny.raw_batch()
    raw['inputs'] = [
        torch.cat([image, image])[:channels] for image in raw['inputs']
    ]
    data = model.data_preprocessor(raw, training=True)
    return data['inputs'], data['data_samples']


@pytest.mark.parametrize('channels', PREPROCESSORS)
def test_the_first_layer_tells(channels):
    model = of_channels(channels)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    assert image_channels(model) == channels
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(m._forward_pre_hooks for m in model.backbone.modules())
    record = blank_pass(model, ['neck'], torch.device('cpu'))
    assert len(record.features('neck')) == 5


@pytest.mark.parametrize(
    'name',
    [
        'yolox/yolox_tiny_8xb8-300e_coco.py',  # rearranges pixels first
        'ssd/ssd300_coco.py',
        'pvt/retinanet_pvt-t_fpn_1x_coco.py',
        'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
        'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
        'hrnet/fcos_hrnetv2p-w18-gn-head_4xb4-1x_coco.py',
    ],
)
def test_of_other_backbones(name):
    model = toy.detector(small_model(toy.stock(name).model))
    assert image_channels(model) == 3


def test_focus_of_one_channel():
    model = toy.stock('yolox/yolox_tiny_8xb8-300e_coco.py').model
    model = toy.detector(small_model(model))
    stem = model.backbone.stem.conv.conv
    stem.in_channels = 4
    stem.weight = torch.nn.Parameter(stem.weight[:, :4])
    assert image_channels(model) == 1


@pytest.mark.parametrize('channels', PREPROCESSORS)
def test_a_pair_of_as_many_channels_learns(channels):
    student, other = (of_channels(channels) for _ in range(2))
    described = dict(
        config=dict(
            model=tiny.retinanet(
                backbone__in_channels=channels,
                data_preprocessor=PREPROCESSORS[channels],
            )
        ),
        checkpoint=None,
    )
    hint = dict(type='mmkd.FeatureHint')
    distiller = build_distiller(
        dict(teacher=described, methods=dict(hint=hint)), student, tiny.CLASSES
    )
    distiller.attach()
    losses = student.loss(*batch_of(student, channels))
    assert losses['hint.loss_hint'] > 0
    parts = probe(tiny.wrap(other, ['neck']))
    assert len(parts['neck']) == 5


@pytest.mark.parametrize(('ours', 'theirs'), [(1, 3), (3, 1), (3, 4)])
@pytest.mark.parametrize('part', ['teacher', 'peers.second'])
def test_a_pair_of_other_channels_is_refused(ours, theirs, part):
    described = dict(
        config=dict(
            model=tiny.retinanet(
                backbone__in_channels=theirs,
                data_preprocessor=PREPROCESSORS[theirs],
            )
        ),
        checkpoint=None,
    )
    methods = dict(m=dict(type='mmkd.KD'))
    cfg = dict(teacher=described, methods=methods)
    if part != 'teacher':
        methods = dict(m=dict(type='mmkd.DML'))
        cfg = dict(peers=dict(second=described), methods=methods)
    with pytest.raises(
        ConfigError,
        match=rf'^distillation\.{part}: its RetinaNet reads images of '
        rf'{theirs} channels, the student of {ours}, .*color_type',
    ):
        build_distiller(cfg, of_channels(ours), tiny.CLASSES)


def test_one_channel_is_normalised_as_the_teacher_wants_it():
    ours = of_channels(1).data_preprocessor
    theirs = of_channels(1, mean=[20.0], std=[2.0]).data_preprocessor
    raw = torch.randint(0, 256, (1, 64, 64), dtype=torch.uint8)
    samples = tiny.raw_batch(sizes=((64, 64),))['data_samples']

    def through(preprocessor):
        data = dict(inputs=[raw.clone()], data_samples=samples)
        return preprocessor(data, training=True)['inputs']

    converted = Renormalize(ours, theirs)(through(ours), samples)
    assert converted.shape == (1, 1, 64, 64)
    torch.testing.assert_close(
        converted[0, 0], (raw[0].float() - 20) / 2, atol=1e-4, rtol=0
    )
    torch.testing.assert_close(converted, through(theirs), atol=1e-4, rtol=0)
