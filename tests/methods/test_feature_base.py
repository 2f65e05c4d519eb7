"""What holds for every method that compares feature maps."""

import pytest
import torch
from mmengine.structures import InstanceData

from mmkd.data.batch import Batch
from mmkd.errors import ConfigError
from mmkd.methods.feature_base import (
    FeatureMethod,
    image_weights,
    position_weights,
)
from mmkd.methods.feature_hint import FeatureHint
from mmkd.registry import METHODS
from tests.helpers import tiny_detectors as tiny
from tests.helpers.feature_maps import (
    FeaturePair,
    own,
    pointwise,
    randomized,
    weights_of,
)

# Options under which an image's loss does not depend on its company.
ALONE = {
    'CWD': {},
    'PKD': dict(per_image=True),
    'MGD': dict(mask_ratio=0.0),
    'FGD': {},
    'FBKD': dict(per_image=True, channel_mask=False),
    'TaT': dict(
        patch_size=[3, 2],
        patches_per_group=2,
        anchor_grid=[3, 4],
        per_image=True,
    ),
}
ALL = list(ALONE)


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


def test_all_are_here():
    METHODS.import_from_location()
    registered = {
        name
        for name, method in METHODS.module_dict.items()
        if issubclass(method, FeatureMethod)
        and method is not FeatureHint
        and method.__module__.startswith('mmkd.')  # not of other tests
    }
    assert registered == set(ALL)


DETECTORS = {
    'faster rcnn': tiny.faster_rcnn(),
    'c4, no neck': tiny.c4(),
    'fcos': tiny.fcos(),
    'detr': tiny.detr(),
}


@pytest.mark.parametrize('name', DETECTORS)
@pytest.mark.parametrize('method', ALL)
def test_any_detector_learns_from_it(method, name):
    pair = FeaturePair(method, DETECTORS[name])
    losses = pair.step(sizes=((96, 128), (64, 96)))
    assert losses
    sum(losses.values()).backward()
    assert all(loss > 0 for loss in losses.values())
    gradient = pair.student.backbone.conv1.weight.grad
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    for parameter in pair.method.parameters():
        assert parameter.grad.isfinite().all()
    assert all(p.grad is None for p in pair.teacher.parameters())


@pytest.mark.parametrize('method', ALL)
def test_zero_weight_is_the_stock_step(method):
    losses = []
    for options in (dict(loss_weight=0.0), None):
        pair = FeaturePair(method, tiny.faster_rcnn(), **(options or {}))
        inputs, samples = tiny.batch_for(pair.student)
        if options is None:
            step = tiny.seeded_loss(pair.student, inputs, samples)
        else:
            step = pair.losses(inputs, samples)
        after = torch.rand(3)
        total = sum(
            sum(v) if isinstance(v, list) else v for v in step.values()
        )
        total.backward()
        gradients = [p.grad for p in pair.student.parameters()]
        losses.append((step, after, gradients))
    (ours, after, gradients), (stock, stock_after, stock_gradients) = losses
    assert ours.keys() == stock.keys()
    assert torch.equal(after, stock_after)
    for name, loss in stock.items():
        for a, b in zip(parts(ours[name]), parts(loss), strict=True):
            assert torch.equal(a, b), name
    for a, b in zip(gradients, stock_gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def parts(value):
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize('method', ALL)
def test_no_global_random_number_is_drawn(method):
    """So the samplers of the next step draw what they would without it."""
    states = []
    for weight in (0.0, 1.0):
        pair = FeaturePair(method, tiny.faster_rcnn(), loss_weight=weight)
        inputs, samples = tiny.batch_for(pair.student)
        losses = pair.losses(inputs, samples)
        assert bool(own(losses)) == bool(weight)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize('method', ALL)
def test_padding_and_company_do_not_matter(method):
    """Beside a larger image, a smaller one is padded."""
    pair = FeaturePair(method, pointwise(), pointwise(24), **ALONE[method])
    randomized(pair.method)
    alone = [pair.images(n) for n in range(4)]
    for numbers in [(0, 1), (1, 2), (3, 0), (2, 1, 0, 3)]:
        together = pair.images(*numbers)
        for name, loss in together.items():
            each = [alone[n][name] for n in numbers]
            assert len(set(each)) == len(each)
            assert loss == pytest.approx(sum(each) / len(each), rel=1e-4)


@pytest.mark.parametrize('method', ALL)
def test_what_lies_on_padding_does_not_matter(method):
    """Also where statistics span the batch, as the papers have it."""
    pair = FeaturePair(method, pointwise(), pointwise(24))
    randomized(pair.method)
    inputs, samples = tiny.batch_for(
        pair.student, sizes=((96, 128), (64, 96), (70, 90))
    )
    losses = []
    for value in (0.0, 7.0):
        for image, sample in zip(inputs, samples, strict=True):
            height, width = sample.img_shape
            # The last position that sees the image pools padding as well.
            image[:, -(-height // 16) * 16 :] = value
            image[:, :, -(-width // 16) * 16 :] = value
        torch.manual_seed(0)
        if hasattr(pair.method, 'draws'):
            pair.method.draws.zero_()
            pair.method.load_state_dict(pair.method.state_dict())
        losses.append(own(pair.losses(inputs, samples)))
    for name, loss in losses[0].items():
        assert loss.item() == pytest.approx(losses[1][name].item(), rel=1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('method', ALL)
def test_half_precision_is_safe(method, dtype):
    """Features as large as float16 holds give a finite loss and gradient."""
    pair = FeaturePair(method)
    maps = {}
    for role, seed in (('student', 1), ('teacher', 2)):
        generator = torch.Generator().manual_seed(seed)
        large = 3e4 * torch.randn(2, 16, 12, 16, generator=generator)
        half = large.clamp(-6e4, 6e4).to(dtype)
        maps[role] = (half, half[..., :6, :8].clone())
    for feature in maps['student']:
        feature.requires_grad_()
    _, samples = tiny.batch_for(pair.student)
    student, teacher = Fixed(maps['student']), Fixed(maps['teacher'])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = pair.method(student, teacher, Batch(None, samples))
    for loss in losses.values():
        assert loss.dtype == torch.float32
        assert loss.isfinite()
    sum(losses.values()).backward()
    for parameter in pair.method.parameters():
        assert parameter.grad.isfinite().all()


class Fixed:
    """Outputs that are what they are."""

    def __init__(self, maps):
        self.maps = maps

    def features(self, *_):
        return self.maps


# ------------------------------------------------------------------- sizes


@pytest.mark.parametrize('method', ALL)
def test_levels_of_other_strides_are_refused(method):
    with pytest.raises(
        ConfigError,
        match=rf'{method} on "neck": level 0 is \(80, 80\) in the student '
        r'and \(40, 40\) in the teacher.*`teacher_levels`, or set resize',
    ):
        FeaturePair(method, tiny.faster_rcnn(), tiny.retinanet())
    pair = FeaturePair(
        method,
        tiny.faster_rcnn(),
        tiny.retinanet(),
        levels=[1, 2],
        teacher_levels=[0, 1],
    )
    assert len(pair.method.adapters) == 2
    assert all(loss > 0 for loss in pair.step().values())


@pytest.mark.parametrize('method', ALL)
def test_maps_that_differ_by_rounding_are_resized(method):
    """A stride of 8 by pooling drops the rest that padding rounds up."""
    ceil = pointwise()
    ceil.backbone.update(type='RoundingUpMaps')
    pair = FeaturePair(method, pointwise(), ceil)
    losses = pair.step(sizes=((100, 120), (100, 120)))
    ours, theirs = pair.features()
    assert [m.shape[-2:] for m in ours] != [m.shape[-2:] for m in theirs]
    assert all(loss > 0 for loss in losses.values())


@pytest.mark.parametrize('method', ALL)
def test_resizing_on_demand(method):
    pair = FeaturePair(
        method, tiny.faster_rcnn(), levels=[1], teacher_levels=[2], resize=True
    )
    assert all(loss > 0 for loss in pair.step().values())


@pytest.mark.parametrize('numbers', [(6, 2), (2, 6), (6, 6)])
@pytest.mark.parametrize('method', [*ALL, 'FeatureHint'])
def test_several_maps_an_image_are_refused(method, numbers):
    """TridentNet's branches, in training, in images without padding."""
    pair = FeaturePair(method)
    _, samples = tiny.batch_for(pair.student, sizes=((96, 128), (96, 128)))
    student, teacher = (
        Fixed([torch.rand(n, 16, 12, 16), torch.rand(n, 16, 6, 8)])
        for n in numbers
    )
    message = r'a tapped map holds 6 images, the batch 2: .* Tap a module that'
    if numbers != (6, 6):
        message = (
            rf'{method} on "neck": the student\'s "neck" gives {numbers[0]} '
            rf'maps .* "neck" {numbers[1]}: .* Tap a module before it'
        )
    with pytest.raises(ConfigError, match=message):
        pair.method(student, teacher, Batch(None, samples))


# ----------------------------------------------------------------- options


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(levels=[0, 9]), r'on "neck": the levels \[0, 9\] are asked for'),
        (dict(levels=[]), r'\.levels must be a list .*got \[\]'),
        (dict(levels=[0, 1], teacher_levels=[1]), r'gives 2 levels'),
        (dict(loss_weight=-1), r'loss_weight must be at least 0, got -1'),
        (dict(source_='neck'), r'no option "source_". Did you mean "source"'),
        (
            dict(source='roi_head.bbox_head.shared_fcs.1'),
            r"student's \"roi_head.*must give maps .* of whole images",
        ),
        (
            dict(teacher_source='roi_head.bbox_roi_extractor', levels=[0]),
            r"teacher's \"roi_head.*mmkd.FeatureHint",
        ),
    ],
)
@pytest.mark.parametrize('method', ALL)
def test_options_that_cannot_be(method, options, message):
    with pytest.raises(ConfigError, match=message):
        FeaturePair(method, tiny.faster_rcnn(), **options)


@pytest.mark.parametrize('method', ['CWD', 'PKD', 'MGD', 'FGD'])
def test_adapters_are_where_widths_differ(method):
    def kinds(**options):
        pair = FeaturePair(method, pointwise(), **options)
        return {type(a).__name__ for a in pair.method.adapters}

    assert kinds() == {'Identity'}
    assert kinds(adapt=True) == {'Conv2d'}
    assert kinds(teacher=pointwise(24)) == {'Conv2d'}
    with pytest.raises(ConfigError, match='without adaptation the widths'):
        kinds(teacher=pointwise(24), adapt=False)


# ------------------------------------------------------------------- maths


def sample_of(shape, full):
    data = tiny.raw_batch(sizes=[shape])['data_samples'][0]
    data.set_metainfo(dict(batch_input_shape=full))
    data.gt_instances = InstanceData(bboxes=torch.zeros(0, 4))
    return data


def test_positions_weigh_their_image():
    full = (64, 64)
    samples = [sample_of((64, 64), full), sample_of((32, 48), full)]
    maps = torch.zeros(2, 5, 4, 4, dtype=torch.float16)
    weights = position_weights(samples, maps)
    assert torch.equal(weights, weights_of([(4, 4), (2, 3)], 4, 4))
    assert weights.dtype == torch.float32
    assert torch.equal(weights, image_weights(samples, maps))
    whole = position_weights(samples[:1], maps[:1])
    assert torch.equal(whole, weights_of([(4, 4)], 4, 4))
