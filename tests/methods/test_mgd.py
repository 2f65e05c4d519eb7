"""MGD: masked generation."""

import copy

import pytest
import torch

from mmkd.errors import ConfigError
from mmkd.methods import MGD
from mmkd.methods.mgd import draw_mask, squared_error
from tests.helpers import tiny_detectors as tiny
from tests.helpers import toy
from tests.helpers.feature_maps import (
    FeaturePair,
    check_official,
    images_of,
    on_maps,
    pointwise,
    random_maps,
    randomized,
)


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


def convolved(maps, conv):
    """A 3x3 convolution with zeros around, position by position."""
    _, height, width = maps.shape
    weight, bias = conv.weight.detach().double(), conv.bias.detach().double()
    result = torch.zeros(len(weight), height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            total = bias.clone()
            for i in range(3):
                for j in range(3):
                    row, column = y + i - 1, x + j - 1
                    if 0 <= row < height and 0 <= column < width:
                        total += weight[:, :, i, j] @ maps[:, row, column]
            result[:, y, x] = total
    return result


def reference(ours, theirs, generator, mask):
    """The summed squared error of one image."""
    hidden = convolved(ours * mask, generator.conv1).clamp(min=0)
    return (convolved(hidden, generator.conv2) - theirs).pow(2).sum().item()


def masks_of(pair, ratio):
    """The masks that the next step of a method will draw, by level."""
    method = copy.deepcopy(pair.method)
    stream = method.next_stream()
    shapes = [(2, 1, 12, 16), (2, 1, 6, 8)]
    return [draw_mask(torch.zeros(shape), ratio, stream) for shape in shapes]


def test_by_hand():
    """Errors of 1 and 3 at one position, with padding beside it."""
    generated = torch.tensor([[2.0, 9.0], [3.0, 9.0]]).view(1, 2, 1, 2)
    target = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    inside = torch.tensor([True, False]).view(1, 1, 1, 2)
    assert squared_error(generated, target, inside) == 10
    both = squared_error(
        generated.repeat(2, 1, 1, 1),
        target.repeat(2, 1, 1, 1),
        inside.repeat(2, 1, 1, 1),
    )
    assert both == 10


@pytest.mark.parametrize('ratio', [0.0, 0.65])
def test_the_formula(ratio):
    pair = FeaturePair('MGD', mask_ratio=ratio, loss_weight=0.5)
    randomized(pair.method)
    masks = masks_of(pair, ratio)
    losses = pair.step(sizes=((96, 128), (64, 96)))
    ours, theirs = pair.features()
    total = 0.0
    for s, t, generator, mask in zip(
        ours, theirs, pair.method.generators, masks, strict=True
    ):
        for a, b, m in zip(
            images_of(s, pair.samples),
            images_of(t, pair.samples),
            images_of(mask, pair.samples),
            strict=True,
        ):
            total += reference(a, b, generator, m)
    assert losses.keys() == {'mgd'}
    assert losses['mgd'].item() == pytest.approx(0.5 * total / 2, rel=1e-4)


class TestOfficialCode:
    def test_the_loss_of_the_masks(self):
        """Sum of squares over the batch by its size, two padded 3x3 layers."""
        student, teacher = (
            [random_maps(2, 6, *size, seed=n) for size in ((9, 12), (5, 6))]
            for n in (1, 2)
        )
        for maps in student:
            maps.requires_grad_()
        method = MGD()
        own = on_maps(method, student, teacher)
        stream = method.stream(0)
        official = 0.0
        for s, t, layers in zip(
            student, teacher, method.generators, strict=True
        ):
            drawn = torch.rand(2, 1, *s.shape[2:], generator=stream)
            mask = torch.where(drawn < 0.65, 0, 1)
            generated = torch.nn.Sequential(
                layers.conv1, torch.nn.ReLU(), layers.conv2
            )(s * mask)
            official = official + 2e-5 * ((generated - t) ** 2).sum() / 2
        check_official(own, official, student, method.parameters())


def test_masks_hide_their_share():
    inside = torch.ones(4, 1, 64, 64)
    for ratio in (0.0, 0.45, 0.65):
        mask = draw_mask(inside, ratio, torch.Generator().manual_seed(1))
        assert mask.dtype == torch.bool
        shares = mask.float().mean((1, 2, 3))
        assert (shares - (1 - ratio)).abs().max() < 0.04
        assert ratio == 0 or not torch.equal(mask[0], mask[1])


def test_what_is_masked_is_not_seen():
    """Only the adapter's bias could tell; a masked position gives 0."""
    pair = FeaturePair('MGD', mask_ratio=0.9)
    masks = masks_of(pair, 0.9)
    seen = []
    for generator in pair.method.generators:
        generator.register_forward_hook(
            lambda _, inputs, __: seen.append(inputs[0])
        )
    pair.step()
    ours, _ = pair.features()
    for given, s, mask in zip(seen, ours, masks, strict=True):
        assert torch.equal(given, s * mask)


def test_the_teacher_can_be_generated():
    """With everything seen, a generator that passes on gives 0."""
    pair = FeaturePair('MGD', mask_ratio=0.0)
    pair.student.load_state_dict(pair.teacher.state_dict())
    for generator in pair.method.generators:
        # Above all features, so that ReLU passes them, and back.
        for conv, bias in ((generator.conv1, 10.0), (generator.conv2, -10.0)):
            torch.nn.init.dirac_(conv.weight)
            torch.nn.init.constant_(conv.bias, bias)
    assert pair.step()['mgd'] < 1e-9


# ----------------------------------------------------------- random numbers


def test_masks_differ_from_step_to_step_and_between_processes(monkeypatch):
    pair = FeaturePair('MGD')
    first, second = masks_of(pair, 0.5), None
    pair.step()
    second = masks_of(pair, 0.5)
    assert not torch.equal(first[0], second[0])
    monkeypatch.setattr('mmkd.methods.mgd.get_rank', lambda: 1)
    assert not torch.equal(second[0], masks_of(pair, 0.5)[0])


def test_masks_are_those_of_the_seed():
    pairs = [FeaturePair('MGD'), FeaturePair('MGD')]
    losses = [[pair.step()['mgd'].item() for _ in range(2)] for pair in pairs]
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]
    pairs[1].method.seed += 1
    assert not torch.equal(
        masks_of(pairs[0], 0.5)[0], masks_of(pairs[1], 0.5)[0]
    )


def test_loaded_state_continues_the_stream():
    pair, other = FeaturePair('MGD'), FeaturePair('MGD')
    for _ in range(3):
        pair.step()
    assert pair.method.draws == 3
    other.step()
    other.method.load_state_dict(pair.method.state_dict())
    assert torch.equal(masks_of(pair, 0.5)[0], masks_of(other, 0.5)[0])


def test_a_resumed_run_draws_the_same_masks(tmp_path):
    """Weights and losses are those of the run that was not interrupted."""

    def config(name, epochs):
        cfg = toy.distilled(
            tmp_path / name,
            toy.RETINANET,
            methods=dict(mgd=dict(type='mmkd.MGD')),
            epochs=epochs,
        )
        cfg.train_cfg.val_interval = 9
        return cfg

    whole = toy.Record()
    toy.train(config('whole', 2), whole)
    toy.train(config('cut', 1))
    cfg = config('cut', 2)
    cfg.resume = True
    resumed = toy.Record()
    toy.train(cfg, resumed)
    assert len(whole.losses) == 2 * len(resumed.losses)
    for a, b in zip(
        whole.losses[-len(resumed.losses) :], resumed.losses, strict=True
    ):
        assert a == b
        assert a['mgd.loss_mgd'] > 0
    states = [
        toy.load(tmp_path / name / 'epoch_2.pth') for name in ('whole', 'cut')
    ]
    assert toy.same(*(state['state_dict'] for state in states))
    assert toy.same(*(state['distillation']['state_dict'] for state in states))


# ----------------------------------------------------------------- options


@pytest.mark.parametrize('ratio', [-0.1, 1.0, float('nan')])
def test_ratios_that_cannot_be(ratio):
    with pytest.raises(ConfigError, match=r'MGD\.mask_ratio must be from'):
        FeaturePair('MGD', mask_ratio=ratio)


def test_the_width_is_the_teachers():
    pair = FeaturePair('MGD', pointwise(), pointwise(24))
    for generator in pair.method.generators:
        assert generator.conv1.weight.shape == (24, 24, 3, 3)


def test_defaults():
    method = FeaturePair('MGD', tiny.retinanet()).method
    assert (method.mask_ratio, method.loss_weight) == (0.65, 2e-5)
