"""Hint learning on real detectors of every kind."""

import copy
import math

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import nn

from mmkd.core.distiller import build_distiller
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError, TapError
from mmkd.methods import FeatureHint
from mmkd.methods.feature_hint import image_weights
from mmkd.registry import METHODS
from mmkd.utils import build_checked
from tests.helpers import tiny_detectors as tiny


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


class HintPair:
    """A student, a teacher and one FeatureHint between them."""

    def __init__(self, student, teacher=None, **options):
        self.student = tiny.build(student, seed=1)
        cfg = dict(
            teacher=dict(
                config=dict(model=teacher or student), checkpoint=None
            ),
            methods=dict(kd=dict(type='mmkd.FeatureHint', **options)),
        )
        self.distiller = build_distiller(
            cfg, self.student, tiny.CLASSES, seed=0
        )
        self.method = self.distiller.methods['kd']
        self.teacher = self.distiller.teacher.model

    def step(self, **batch):
        """The losses of a distilled step on a batch."""
        self.inputs, self.samples = tiny.batch_for(self.student, **batch)
        self.distiller.attach()
        try:
            return tiny.seeded_loss(self.student, self.inputs, self.samples)
        finally:
            self.distiller.detach()

    def hint(self, **batch):
        return self.step(**batch)['kd.loss_hint'].item()

    def adapted(self, features):
        """The student's features behind the adapters' weights."""
        with torch.no_grad():
            return [
                torch.einsum(
                    'oi,bihw->bohw', layer.weight[:, :, 0, 0], feature
                )
                + layer.bias[:, None, None]
                for layer, feature in zip(
                    self.method.adapters, features, strict=True
                )
            ]


def mean_square(ours, theirs):
    """The mean over levels of the mean over elements, in plain floats."""
    means = []
    for a, b in zip(ours, theirs, strict=True):
        squares = [
            (x - y) ** 2
            for x, y in zip(
                a.flatten().tolist(), b.flatten().tolist(), strict=True
            )
        ]
        means.append(sum(squares) / len(squares))
    return sum(means) / len(means)


# ------------------------------------------------------- every detector

DETECTORS = {
    'faster rcnn': tiny.faster_rcnn(),
    'c4, no neck': tiny.c4(),
    'retinanet': tiny.retinanet(),
    'fcos': tiny.fcos(),
    'detr': tiny.detr(),
}


@pytest.mark.parametrize('name', DETECTORS)
def test_the_necks_of_any_detector(name):
    pair = HintPair(DETECTORS[name])
    losses = pair.step()
    with torch.no_grad():
        ours = pair.student.extract_feat(pair.inputs)
        theirs = pair.teacher.extract_feat(pair.inputs)
    expected = mean_square(pair.adapted(ours), theirs)
    hint = losses['kd.loss_hint']
    assert hint.item() == pytest.approx(expected, rel=1e-4)
    stock = tiny.seeded_loss(pair.student, pair.inputs, pair.samples)
    assert losses.keys() - stock.keys() == {'kd.loss_hint'}
    hint.backward()
    assert pair.student.backbone.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in pair.method.parameters())
    assert all(p.grad is None for p in pair.teacher.parameters())


def test_between_detectors_of_different_kinds():
    """FCOS teaches RetinaNet: their levels have the same strides."""
    pair = HintPair(tiny.retinanet(), tiny.fcos())
    losses = pair.step()
    with torch.no_grad():
        ours = pair.student.extract_feat(pair.inputs)
        inputs = pair.distiller.teacher.renormalize(pair.inputs, pair.samples)
        theirs = pair.teacher.extract_feat(inputs)
    assert pair.distiller.teacher.renormalize.needed
    assert losses['kd.loss_hint'].item() == pytest.approx(
        mean_square(pair.adapted(ours), theirs), rel=1e-4
    )


def test_a_backbone_layer_of_another_width():
    wide = tiny.faster_rcnn(
        backbone__base_channels=16, neck__in_channels=[16, 32, 64, 128]
    )
    pair = HintPair(tiny.faster_rcnn(), wide, source='backbone', levels=[1, 3])
    shapes = [tuple(a.weight.shape[:2]) for a in pair.method.adapters]
    assert shapes == [(32, 16), (128, 64)]
    hint = pair.hint()
    with torch.no_grad():
        ours = pair.student.backbone(pair.inputs)
        theirs = pair.teacher.backbone(pair.inputs)
    expected = mean_square(
        pair.adapted([ours[1], ours[3]]), [theirs[1], theirs[3]]
    )
    assert hint == pytest.approx(expected, rel=1e-4)


def test_without_adaptation_the_features_meet_as_they_are():
    pair = HintPair(tiny.faster_rcnn(), adapt=False)
    assert not list(pair.method.parameters())
    hint = pair.hint()
    with torch.no_grad():
        ours = pair.student.extract_feat(pair.inputs)
        theirs = pair.teacher.extract_feat(pair.inputs)
    assert hint == pytest.approx(mean_square(ours, theirs), rel=1e-4)
    pair.student.load_state_dict(pair.teacher.state_dict())
    pair.student.eval()
    assert pair.hint() == 0


def test_another_loss():
    pair = HintPair(
        tiny.faster_rcnn(),
        adapt=False,
        levels=[2],
        loss=dict(type='mmkd.HintLoss', norm='l1', loss_weight=3.0),
    )
    hint = pair.hint()
    with torch.no_grad():
        ours = pair.student.extract_feat(pair.inputs)[2]
        theirs = pair.teacher.extract_feat(pair.inputs)[2]
    assert hint == pytest.approx(3 * (ours - theirs).abs().mean().item())


# ------------------------------------------------------------- levels


def test_levels_of_other_strides_are_paired_by_hand():
    """The FPN of Faster R-CNN starts a level below RetinaNet's."""
    with pytest.raises(
        ConfigError,
        match=r'FeatureHint on "neck": level 0 is \(80, 80\) in the student '
        r'and \(40, 40\) in the teacher.*`teacher_levels`, or set resize',
    ):
        HintPair(tiny.faster_rcnn(), tiny.retinanet())
    pair = HintPair(
        tiny.faster_rcnn(),
        tiny.retinanet(),
        levels=[1, 2, 3],
        teacher_levels=[0, 1, 2],
    )
    hint = pair.hint()
    with torch.no_grad():
        ours = pair.student.extract_feat(pair.inputs)
        theirs = pair.teacher.extract_feat(pair.inputs)
    assert hint == pytest.approx(
        mean_square(pair.adapted(ours[1:4]), theirs[:3]), rel=1e-4
    )


def test_resizing_on_demand():
    pair = HintPair(
        tiny.faster_rcnn(),
        levels=[1],
        teacher_levels=[2],
        adapt=False,
        resize=True,
    )
    hint = pair.hint()
    with torch.no_grad():
        ours = pair.student.extract_feat(pair.inputs)[1]
        theirs = pair.teacher.extract_feat(pair.inputs)[2]
    # Halved by bilinear interpolation, 2x2 positions are averaged.
    halved = nn.functional.avg_pool2d(ours, 2)
    assert halved.shape == theirs.shape
    assert hint == pytest.approx(mean_square([halved], [theirs]), rel=1e-4)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            dict(levels=[0, 5]),
            r'levels \[0, 5\] are asked for, but .* 5 ',
        ),
        (dict(levels=[0, 1], teacher_levels=[2]), r'gives 2 levels, the te'),
        (dict(levels=[]), r'FeatureHint.levels must be a list .*got \[\]'),
        (dict(levels=[-1]), r'levels must be a list of level numbers from 0'),
        (dict(teacher_levels=2), r'teacher_levels must be .*got 2'),
        (dict(source='backbone.layer2', teacher_source='neck'), r'1 levels, '),
        (dict(sources='neck'), 'no option "sources". Did you mean "source"'),
        (dict(loss=dict(type='mmkd.HintLos')), r'FeatureHint.loss: type "mmk'),
        (
            dict(loss_weight=-0.5),
            r'FeatureHint.loss_weight must be at least 0',
        ),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        HintPair(tiny.faster_rcnn(), **options)


def test_a_map_and_vectors_cannot_meet():
    with pytest.raises(ConfigError, match='both must be maps'):
        HintPair(
            tiny.faster_rcnn(),
            source='neck',
            levels=[0],
            teacher_source='roi_head.bbox_head.shared_fcs.1',
        )


# ------------------------------------------------------------------- rois

FCS = 'roi_head.bbox_head.shared_fcs.1'


def test_the_vectors_of_the_rois():
    pair = HintPair(
        tiny.faster_rcnn(),
        tiny.faster_rcnn(roi_head__bbox_head__fc_out_channels=40),
        source=FCS,
    )
    (adapter,) = pair.method.adapters
    assert isinstance(adapter, nn.Linear)
    assert adapter.weight.shape == (40, 24)
    outputs = StepRecord(pair.student, [FCS])
    with outputs.recording():
        hint = pair.hint(sizes=((96, 128), (64, 96)))
    ours = outputs.features(FCS)[0]
    with torch.no_grad():
        maps = pair.teacher.extract_feat(pair.inputs)
        head = pair.teacher.roi_head
        x = head.bbox_roi_extractor(maps[:4], outputs.rois[0].boxes).flatten(1)
        for layer in head.bbox_head.shared_fcs:
            x = layer(x).relu()
    adapted = ours @ adapter.weight.T + adapter.bias
    assert hint == pytest.approx(mean_square([adapted], [x]), rel=1e-4)


@pytest.mark.parametrize('rois', [1, 12])
def test_the_maps_of_the_rois_have_no_padding(rois):
    """Also where there are as many RoIs as images."""
    path = 'roi_head.bbox_roi_extractor'
    config = tiny.faster_rcnn(train_cfg__rcnn__sampler__num=rois)
    pair = HintPair(config, source=path, adapt=False)
    outputs = StepRecord(pair.student, [path])
    with outputs.recording():
        hint = pair.hint(sizes=((96, 128), (64, 96)))
    (ours,) = outputs.features(path)
    assert ours.shape == (2 * rois, 16, 7, 7)
    with torch.no_grad():
        maps = pair.teacher.extract_feat(pair.inputs)
        theirs = pair.teacher.roi_head.bbox_roi_extractor(
            maps[:4], outputs.rois[0].boxes
        )
    assert hint == pytest.approx(mean_square([ours], [theirs]), rel=1e-4)


@pytest.mark.parametrize('stage', [0, 2])
def test_one_stage_of_a_cascade_meets_a_single_head(stage):
    """On the RoIs of that stage alone."""
    source = f'roi_head.bbox_head.{stage}.shared_fcs.1'
    pair = HintPair(
        tiny.cascade_rcnn(),
        tiny.faster_rcnn(),
        source=source,
        teacher_source=FCS,
        adapt=False,
    )
    calls = []
    pair.teacher.roi_head.bbox_head.register_forward_hook(
        lambda *call: calls.append(call)
    )
    outputs = StepRecord(pair.student, [source])
    with outputs.recording():
        hint = pair.hint()
    assert len(calls) == 1
    (ours,) = outputs.features(source)
    with torch.no_grad():
        maps = pair.teacher.extract_feat(pair.inputs)
        head = pair.teacher.roi_head
        x = head.bbox_roi_extractor(maps[:4], outputs.rois[stage].boxes)
        x = x.flatten(1)
        for layer in head.bbox_head.shared_fcs:
            x = layer(x).relu()
    assert hint == pytest.approx(mean_square([ours], [x]), rel=1e-4)


# ---------------------------------------------------------------- padding


@MODELS.register_module()
class Pointwise(BaseModule):
    """A backbone without neighbours: each position sees its own pixels."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d(8)
        self.conv1 = nn.Conv2d(3, 8, 1)

    def forward(self, x):
        x = self.pool(x)
        return self.conv1(x), self.conv1(nn.functional.avg_pool2d(x, 2))


def pointwise():
    """A detector whose features don't depend on padding or on a batch."""
    model = tiny.retinanet()
    model.backbone = dict(type='Pointwise')
    model.neck = dict(
        type='ChannelMapper',
        in_channels=[8, 8],
        kernel_size=1,
        out_channels=16,
        act_cfg=None,
        num_outs=2,
    )
    model.bbox_head.anchor_generator.strides = [8, 16]
    return model


@pytest.fixture(scope='module')
def plain():
    return HintPair(pointwise())


def batch_of(pair, *numbers):
    """The same images in any company."""
    sizes = [(96, 128), (64, 96), (70, 90), (128, 64)]
    raw = tiny.raw_batch(sizes=sizes)
    data = pair.student.data_preprocessor(
        {key: [value[n] for n in numbers] for key, value in raw.items()},
        training=True,
    )
    pair.distiller.attach()
    try:
        losses = tiny.seeded_loss(
            pair.student, data['inputs'], data['data_samples']
        )
    finally:
        pair.distiller.detach()
    return losses['kd.loss_hint'].item()


def test_padding_does_not_count(plain):
    """Beside a larger image, a smaller one is padded."""
    alone = [batch_of(plain, n) for n in range(4)]
    assert len({round(value, 5) for value in alone}) == 4
    for numbers in [(0, 1), (1, 2), (3, 0), (0, 1, 2, 3)]:
        expected = sum(alone[n] for n in numbers) / len(numbers)
        assert batch_of(plain, *numbers) == pytest.approx(expected, rel=1e-5)


def test_the_order_of_a_batch_does_not_matter(plain):
    assert batch_of(plain, 2, 0, 1) == pytest.approx(batch_of(plain, 0, 1, 2))


def sample(shape, full):
    data = tiny.raw_batch(sizes=[shape])['data_samples'][0]
    data.set_metainfo(dict(batch_input_shape=full))
    return data


def test_weights_average_over_each_image():
    full = (64, 64)
    samples = [sample((64, 64), full), sample((32, 48), full)]
    weights = image_weights(samples, torch.zeros(2, 5, 4, 4))
    assert weights.shape == (2, 1, 4, 4)
    assert (weights[0] == 1 / 16).all()
    expected = torch.zeros(4, 4)
    expected[:2, :3] = 1 / 6
    assert torch.equal(weights[1, 0], expected)


@pytest.mark.parametrize(
    ('side', 'positions'), [(1, 1), (15, 1), (16, 1), (17, 2), (33, 3)]
)
def test_a_position_that_sees_a_part_of_the_image_counts(side, positions):
    samples = [sample((64, 64), (64, 64)), sample((side, 64), (64, 64))]
    weights = image_weights(samples, torch.zeros(2, 5, 4, 4))
    assert (weights[1, 0, :, 0] > 0).sum() == positions


def test_no_weights_without_padding_or_for_vectors():
    whole = [sample((64, 64), (64, 64))] * 2
    assert image_weights(whole, torch.zeros(2, 5, 4, 4)) is None
    padded = [*whole, sample((32, 64), (64, 64))]
    assert image_weights(padded, torch.zeros(9, 5)) is None
    assert image_weights(padded, torch.zeros(3, 5, 4, 4)) is not None


def test_maps_that_are_not_one_an_image_cannot_be_masked():
    padded = [sample((32, 64), (64, 64))] * 2
    with pytest.raises(
        ConfigError, match=r'holds 6 images, the batch 2: padding cannot be'
    ):
        image_weights(padded, torch.zeros(6, 5, 4, 4))


# --------------------------------------------------------------- taps


def test_a_tap_that_never_fires_lists_what_did():
    with pytest.raises(
        TapError,
        match=r'"rpn_head.rpn_cnv" of FasterRCNN never fired.*Did you mean '
        r'"rpn_head.rpn_conv".*Fired: rpn_head',
    ):
        HintPair(tiny.faster_rcnn(), source='rpn_head.rpn_cnv')


def test_a_tap_that_the_teacher_lacks():
    with pytest.raises(
        TapError, match=r'"rpn_head.rpn_conv" of RetinaNet never fired'
    ):
        HintPair(
            tiny.faster_rcnn(), tiny.retinanet(), source='rpn_head.rpn_conv'
        )


def test_a_tap_that_only_the_whole_teacher_fires():
    """Its mask head runs in a test, but nobody asks for it in training."""
    path = 'roi_head.mask_head.convs.0'
    pair = HintPair(tiny.mask_rcnn(), source=path)
    with pytest.raises(
        TapError, match=r'did not run.*The teacher runs what methods read'
    ):
        pair.step(masks=True)


def test_taps_on_a_shared_head_are_its_levels():
    pair = HintPair(tiny.faster_rcnn(), source='rpn_head.rpn_conv')
    assert len(pair.method.adapters) == 5
    assert pair.hint() > 0


# ------------------------------------------------------------- the adapters


def test_adapters_are_seeded_and_their_own():
    weights = []
    for _ in range(2):
        torch.manual_seed(len(weights))
        pair = HintPair(tiny.faster_rcnn())
        weights.append(copy.deepcopy(pair.method.adapters.state_dict()))
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name])
    first, second = (a.weight for a in pair.method.adapters[:2])
    assert not torch.equal(first, second)


def test_a_hint_can_be_learned():
    """Gradient steps on the adapters alone bring the features together."""
    pair = HintPair(pointwise())
    optimizer = torch.optim.SGD(pair.method.parameters(), lr=0.1)
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = pair.step()['kd.loss_hint']
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.5 * values[0]


def test_defaults():
    method = build_checked(METHODS, dict(type='mmkd.FeatureHint'), 'x')
    assert isinstance(method, FeatureHint)
    assert (method.source, method.teacher_source) == ('neck', 'neck')
    assert (method.adapt, method.resize) == (True, False)
    assert method.loss.norm == 'l2'
    assert math.isclose(method.loss_weight, 1.0)
