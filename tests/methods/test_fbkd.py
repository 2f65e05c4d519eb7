"""FBKD: attention-guided and non-local distillation."""

import math

import pytest
import torch

from mmkd.errors import ConfigError
from mmkd.methods.fbkd import NonLocal
from tests.helpers import tiny_detectors as tiny
from tests.helpers.feature_maps import (
    FeaturePair,
    images_of,
    pointwise,
    random_maps,
    randomized,
    twin,
    weights_of,
)

SIZES = ((96, 128), (64, 96), (70, 90))
WEIGHTS = dict(
    feature_weight=0.5, attention_weight=0.25, relation_weight=0.125
)


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


# ------------------------------------------------------------- the reference


def values(module):
    return {n: v.detach().double() for n, v in module.named_parameters()}


def mixed(image, p, name):
    """A 1x1 convolution of an image (C, h, w)."""
    weight, bias = p[f'{name}.weight'][:, :, 0, 0], p[f'{name}.bias']
    return torch.einsum('oi,ihw->ohw', weight, image) + bias[:, None, None]


def cells_of(image, side):
    """Each cell's maximum, (C, cells)."""
    _, height, width = image.shape
    return torch.stack(
        [
            image[:, y : y + side, x : x + side].flatten(1).max(1).values
            for y in range(0, height, side)
            for x in range(0, width, side)
        ],
        dim=1,
    )


def related(images, block, per_image):
    """R of images, position by position."""
    p = values(block)
    added = []
    for image in images:
        phi = cells_of(mixed(image, p, 'phi'), block.pooling)
        g = cells_of(mixed(image, p, 'g'), block.pooling)
        result = torch.zeros(len(g), *image.shape[1:], dtype=torch.float64)
        theta = mixed(image, p, 'theta')
        for y in range(image.shape[1]):
            for x in range(image.shape[2]):
                for j in range(g.shape[1]):
                    similarity = theta[:, y, x] @ phi[:, j]
                    result[:, y, x] += similarity * g[:, j] / g.shape[1]
        added.append(mixed(result, p, 'out'))
    pools = [[a] for a in added] if per_image else [added] * len(added)
    results = []
    for image, a, pool in zip(images, added, pools, strict=True):
        everything = torch.cat([m.flatten(1) for m in pool], dim=1)
        mean = everything.mean(1)[:, None, None]
        variance = everything.var(1, unbiased=False)[:, None, None]
        normal = (a - mean) / (variance + 1e-5).sqrt()
        results.append(image + normal * p['scale'] + p['shift'])
    return results


def softmax_times_number(sizes, temperature):
    powers = [math.exp(v / temperature) for v in sizes.flatten().tolist()]
    shares = [len(powers) * v / sum(powers) for v in powers]
    return torch.tensor(shares, dtype=torch.float64).view_as(sizes)


def mask(s, t, temperature, channel_mask):
    """The mean of both networks' attention, of one image."""
    where = [
        softmax_times_number(m.abs().mean(0), temperature) for m in (s, t)
    ]
    result = (where[0] + where[1]) / 2
    if not channel_mask:
        return result[None]
    which = [
        softmax_times_number(m.abs().mean((1, 2)), temperature) for m in (s, t)
    ]
    return result * ((which[0] + which[1]) / 2)[:, None, None]


def neighbours(image, conv):
    """A 3x3 convolution of one channel with zeros around it."""
    weight, bias = conv.weight[0, 0].detach(), conv.bias.detach()
    height, width = image.shape
    result = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            result[y, x] = bias + sum(
                weight[i, j] * image[y + i - 1, x + j - 1]
                for i in range(3)
                for j in range(3)
                if 0 <= y + i - 1 < height and 0 <= x + j - 1 < width
            )
    return result


def level_squares(layers, ours, theirs, options):
    """Squared errors of each loss, one number an image."""
    p = values(layers)
    per_image = options.get('per_image', False)
    relations_s = related(ours, layers.student_block, per_image)
    relations_t = related(theirs, layers.teacher_block, per_image)
    squares = {n: [] for n in ('feature', 'channel', 'spatial', 'relation')}
    for s, t, r_s, r_t in zip(
        ours, theirs, relations_s, relations_t, strict=True
    ):
        weight = mask(s, t, 0.3, options.get('channel_mask', False))
        error = (t - mixed(s, p, 'feature')) ** 2 * weight
        squares['feature'].append(error.sum().item())
        pooled = p['channel.weight'] @ s.mean((1, 2)) + p['channel.bias']
        error = (t.mean((1, 2)) - pooled) ** 2
        squares['channel'].append(error.sum().item())
        error = (t.mean(0) - neighbours(s.mean(0), layers.spatial)) ** 2
        squares['spatial'].append(error.sum().item())
        error = (r_t - mixed(r_s, p, 'relation')) ** 2
        squares['relation'].append(error.sum().item())
    return squares


@pytest.mark.parametrize(
    'options',
    [{}, dict(per_image=True), dict(channel_mask=True)],
    ids=['default', 'per image', 'channel mask'],
)
def test_the_formula(options):
    width = 16 if options.get('channel_mask') else 8
    pair = FeaturePair(
        'FBKD',
        pointwise(),
        pointwise(width),
        temperature=0.3,
        pooling=[5, 4],
        loss_weight=2.0,
        **WEIGHTS,
        **options,
    )
    randomized(pair.method)
    losses = pair.step(sizes=SIZES)
    expected = dict.fromkeys(losses, 0.0)
    for layers, s, t in zip(pair.method.layers, *pair.features(), strict=True):
        squares = level_squares(
            layers,
            images_of(s, pair.samples),
            images_of(t, pair.samples),
            options,
        )
        for name, images in squares.items():
            weight = WEIGHTS.get(f'{name}_weight', WEIGHTS['attention_weight'])
            norm = math.sqrt(sum(images))
            if options.get('per_image'):
                norm = sum(map(math.sqrt, images)) / len(images)
            expected[name] += 2 * weight * norm
    assert losses.keys() == {'feature', 'channel', 'spatial', 'relation'}
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4)


# --------------------------------------------------------------- by hand


def test_norms_by_hand():
    """Errors of 3 and 4 in two images: 5 together, 3.5 on average."""
    differences = torch.tensor([[3.0], [-4.0]])
    norms = [
        FeaturePair('FBKD', per_image=choice).method._norm(differences)
        for choice in (False, True)
    ]
    assert norms == [5.0, 3.5]


def test_a_block_by_hand():
    """Two positions of 1 and 3, one channel, all layers the identity."""
    block = NonLocal(1, pooling=1, per_image=False)
    for layer in (block.theta, block.phi, block.g, block.out):
        torch.nn.init.ones_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    torch.nn.init.ones_(block.scale)
    maps = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)
    # Mean of g * phi is (1 + 9) / 2; times theta 5 and 15; normalised -1, 1.
    result = block(maps, weights_of([(1, 2)], 1, 2))
    assert result.flatten().tolist() == pytest.approx([0.0, 4.0], abs=1e-4)


def test_a_block_starts_as_the_identity():
    block = NonLocal(6, pooling=2, per_image=False)
    maps = random_maps(2, 6, 4, 5)
    weights = weights_of([(4, 5), (2, 3)], 4, 5)
    assert torch.equal(block(maps, weights), maps)


def test_memory_is_linear_in_the_number_of_positions():
    def saved(side):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        block = NonLocal(4, pooling=1, per_image=False)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            block(
                random_maps(1, 4, side, side),
                weights_of([(side, side)], side, side),
            )
        return total

    assert saved(64) / saved(16) < 16.1


def test_the_teacher_itself_is_the_minimum():
    """With layers that pass on what they are given."""
    pair = FeaturePair('FBKD')
    assert all(loss > 0 for loss in pair.step().values())
    for layers in pair.method.layers:
        for layer in (layers.feature, layers.relation, layers.spatial):
            torch.nn.init.dirac_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        torch.nn.init.eye_(layers.channel.weight)
        torch.nn.init.zeros_(layers.channel.bias)
    twin(pair)
    losses = pair.step()
    assert all(loss < 1e-6 for loss in losses.values())
    sum(losses.values()).backward()
    for parameter in pair.method.parameters():
        assert parameter.grad.isfinite().all()


def test_the_mask_gets_no_gradient():
    pair = FeaturePair('FBKD', levels=[1])
    student = random_maps(2, 16, 6, 8).requires_grad_()
    teacher = random_maps(2, 16, 6, 8, seed=1)
    weights = weights_of([(6, 8), (3, 8)], 6, 8)
    mask = pair.method._mask(student, teacher, weights)
    assert not mask.requires_grad
    assert (mask[1, :, 3:] == 0).all()
    assert mask.sum((1, 2, 3)).tolist() == pytest.approx([48, 24])


# ----------------------------------------------------------------- options


def test_the_last_pooling_holds_for_what_follows():
    pair = FeaturePair('FBKD', tiny.faster_rcnn())
    blocks = [layers.student_block for layers in pair.method.layers]
    assert [block.pooling for block in blocks] == [8, 4, 2, 2, 2]
    hidden = [block.theta.out_channels for block in blocks]
    assert hidden == [4, 4, 8, 8, 8]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(temperature=0), r'FBKD\.temperature must be above 0, got 0'),
        (dict(feature_weight=-1), r'feature_weight must be at least 0'),
        (dict(attention_weight=-1), r'attention_weight must be at least 0'),
        (dict(relation_weight=-1), r'FBKD\.relation_weight must be at least'),
        (dict(pooling=[]), r'FBKD\.pooling must be a list .*got \[\]'),
        (dict(pooling=[8, 0]), r'pooling must be a list of sides .*got \[8'),
        (dict(pooling=2), r'pooling must be a list of sides .*got 2'),
        (dict(adapt=True), r'no option "adapt"'),
        (
            dict(channel_mask=True, teacher=pointwise(24)),
            r'level 0: channel_mask=True .* which have 16 and 24',
        ),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        FeaturePair('FBKD', pointwise(), **options)


def test_defaults_are_the_official_ones():
    method = FeaturePair('FBKD').method
    assert (method.temperature, method.channel_mask) == (0.5, False)
    assert list(method.weights.values()) == [7e-5, 4e-3, 4e-3, 7e-5]
