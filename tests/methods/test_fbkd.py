"""FBKD: attention-guided and non-local distillation."""

import math

import pytest
import torch

from mmkd.errors import ConfigError
from mmkd.methods import FBKD
from mmkd.methods.fbkd import NonLocal
from tests.helpers import tiny_detectors as tiny
from tests.helpers.feature_maps import (
    FeaturePair,
    check_official,
    images_of,
    on_maps,
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
    mixed = torch.einsum('oi,ihw->ohw', p[f'{name}.weight'][..., 0, 0], image)
    if f'{name}.bias' in p:
        mixed = mixed + p[f'{name}.bias'][:, None, None]
    return mixed


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


class TestOfficialCode:
    """Sums over a batch without padding, whose maps the cells divide."""

    @staticmethod
    def related(maps, block, pool):
        """NonLocalBlockND: W is a convolution with batch normalisation."""
        images, _, height, width = maps.shape
        g, phi = (pool(f(maps)).view(images, -1) for f in (block.g, block.phi))
        g, phi = (m.view(images, block.g.out_channels, -1) for m in (g, phi))
        theta = block.theta(maps).view(images, block.g.out_channels, -1)
        pairwise = theta.permute(0, 2, 1) @ phi
        pairwise = pairwise / pairwise.shape[-1]
        y = (pairwise @ g.permute(0, 2, 1)).permute(0, 2, 1)
        norm = torch.nn.BatchNorm2d(maps.shape[1])
        y = block.out(y.reshape(images, -1, height, width))
        y = torch.nn.functional.batch_norm(
            y, None, None, block.scale.view(-1), block.shift.view(-1),
            training=True, eps=norm.eps,
        )  # fmt: skip
        return maps + y

    @staticmethod
    def attention(maps, t):
        where = maps.abs().mean(1, keepdim=True)
        number = where[0].numel()
        share = (where.view(len(maps), -1) / t).softmax(1) * number
        which = maps.abs().mean((2, 3), keepdim=True)
        channels = (which / t).softmax(1) * maps.shape[1]
        return share.view(where.shape), channels

    @pytest.mark.parametrize('form', ['mmrazor', 'two-stage', 'one-stage'])
    def test_the_four_losses(self, form):
        options = dict(FBKD.official[FORMS.index(form)].options)
        options.pop('levels', None)
        sizes = [(32, 48), (16, 24), (8, 12), (4, 8)]
        if form != 'mmrazor':
            sizes.append((2, 4))
        student, teacher = (
            [random_maps(2, 8, *size, seed=n) for size in sizes]
            for n in (1, 2)
        )
        for maps in student:
            maps.requires_grad_()
        method = FBKD(**options)
        own = on_maps(method, student, teacher)
        t, factor = (0.1, 6) if form == 'one-stage' else (0.5, 1)
        official = 0.0
        for level, (s, x) in enumerate(zip(student, teacher, strict=True)):
            layers = method.layers[level]
            stride = [8, 4, 2, 2, 2][level]
            pool = torch.nn.MaxPool2d(stride)
            if form == 'mmrazor':  # NonLocal2d pools before
                pool = torch.nn.Sequential(torch.nn.MaxPool2d(2), pool)
            (where_s, which_s), (where_t, which_t) = (
                self.attention(m, t) for m in (s, x)
            )
            squares = (x - layers.feature(s)) ** 2
            squares = squares * ((where_t + where_s) / 2).detach()
            if form == 'one-stage':
                squares = squares * ((which_t + which_s) / 2).detach()
            official = official + 7e-5 * factor * squares.sum() ** 0.5
            channels = layers.channel(s.mean((2, 3)))
            spatial = layers.spatial(s.mean(1, keepdim=True))
            official = official + 4e-3 * factor * (
                torch.dist(x.mean((2, 3)), channels)
                + torch.dist(x.mean(1, keepdim=True), spatial)
            )
            related_s, related_t = (
                self.related(m, block, pool)
                for m, block in (
                    (s, layers.student_block),
                    (x, layers.teacher_block),
                )
            )
            official = official + 7e-5 * factor * torch.dist(
                related_t, layers.relation(related_s)
            )
            hidden = [64, 64, 128, 128, 128][level] * 8 // 256
            assert layers.student_block.g.out_channels == hidden
        check_official(own, official, student, method.parameters())


FORMS = ['mmrazor', 'two-stage', 'one-stage']


# --------------------------------------------------------------- by hand


def test_norms_by_hand():
    """Errors of 3 and 4 in two images: 5 together, 3.5 on average."""
    differences = torch.tensor([[3.0], [-4.0]])
    norms = [
        FeaturePair('FBKD', per_image=choice).method._norm(differences)
        for choice in (False, True)
    ]
    assert norms == [5.0, 3.5]


@pytest.mark.parametrize('per_image', [False, True])
def test_norms_of_large_maps(per_image):
    """A plain sum of so many squares is off by one per cent."""
    method = FBKD(per_image=per_image)
    differences = torch.full((1, 256, 200, 336), 0.3)
    norm = method._norm(differences).item()
    expected = 0.3 * math.sqrt(differences.numel())
    assert norm == pytest.approx(expected, rel=1e-4)


def test_a_block_by_hand():
    """Two positions of 1 and 3, one channel, all layers the identity."""
    block = NonLocal(1, pooling=1, reduction=2, per_image=False)
    for layer in (block.theta, block.phi, block.g, block.out):
        torch.nn.init.ones_(layer.weight)
        if layer.bias is not None:
            torch.nn.init.zeros_(layer.bias)
    torch.nn.init.ones_(block.scale)
    maps = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)
    # Mean of g * phi is (1 + 9) / 2; times theta 5 and 15; normalised -1, 1.
    result = block(maps, weights_of([(1, 2)], 1, 2))
    assert result.flatten().tolist() == pytest.approx([0.0, 4.0], abs=1e-4)


def test_a_block_starts_as_the_identity():
    block = NonLocal(6, pooling=2, reduction=2, per_image=False)
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

        block = NonLocal(4, pooling=1, reduction=2, per_image=False)
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
    assert [block.pooling for block in blocks] == [16, 8, 4, 4, 4]
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
        (dict(reduction=[]), r'FBKD\.reduction must be a list of divisors'),
        (dict(reduction=[4, 0]), r'reduction must be a list .*got \[4, 0\]'),
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
