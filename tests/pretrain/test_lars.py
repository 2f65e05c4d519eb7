"""LARS beside its formula."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmkd.errors import ConfigError
from mmkd.pretrain.lars import LARS


def parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (2, 3, 3, 3), (5,)]
    return [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]


def gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator) for p in parameters()]


def test_is_the_formula():
    """Of three steps with different rates, in double precision."""
    weights = parameters()
    optimizer = LARS(weights, lr=1.0, momentum=0.9, weight_decay=0.1)
    expected = [w.detach().double() for w in weights]
    moved = [torch.zeros_like(w) for w in expected]
    for step, rate in enumerate((0.5, 2.0, 1.0)):
        optimizer.param_groups[0]['lr'] = rate
        for weight, gradient in zip(weights, gradients(step), strict=True):
            weight.grad = gradient
        optimizer.step()
        for i, gradient in enumerate(gradients(step)):
            w, d, trust = expected[i], gradient.double(), 1.0
            if w.dim() > 1:
                d = d + 0.1 * w
                trust = 0.001 * w.norm() / d.norm()
            moved[i] = 0.9 * moved[i] + rate * trust * d
            expected[i] = w - moved[i]
    for weight, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.data, value.float())


def test_vectors_move_as_by_sgd():
    ours, theirs = (nn.Parameter(torch.ones(5)) for _ in range(2))
    pairs = (
        (LARS([ours], 0.1, weight_decay=1.0), ours),
        (
            torch.optim.SGD([theirs], 0.1, momentum=0.9),
            theirs,
        ),
    )
    for step in range(3):
        for optimizer, weight in pairs:
            weight.grad = gradients(step)[2]
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(('weight', 'gradient'), [(0.0, 2.0), (2.0, 0.0)])
def test_a_norm_of_0_has_the_rate_itself(weight, gradient):
    w = nn.Parameter(torch.full((1, 1), weight))
    w.grad = torch.full((1, 1), gradient)
    LARS([w], lr=0.5).step()
    assert w.item() == weight - 0.5 * gradient


def test_goes_on_from_its_state():
    whole, first, second = parameters(), parameters(), parameters()
    optimizers = [LARS(each, lr=1.0) for each in (whole, first, second)]

    def step(number, index):
        for w, g in zip(
            (whole, first, second)[index], gradients(number), strict=True
        ):
            w.grad = g
        optimizers[index].step()

    step(0, 0)
    step(1, 0)
    step(0, 1)
    for mine, theirs in zip(second, first, strict=True):
        mine.data.copy_(theirs.data)
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    step(1, 2)
    for mine, theirs in zip(second, whole, strict=True):
        assert torch.equal(mine, theirs)


def test_configs_name_it():
    model = nn.Linear(2, 2)
    cfg = dict(type='OptimWrapper', optimizer=dict(type='mmkd.LARS', lr=0.3))
    built = build_optim_wrapper(model, cfg).optimizer
    assert isinstance(built, LARS)
    assert built.defaults['momentum'] == 0.9


@pytest.mark.parametrize(
    ('option', 'value'),
    [('lr', 0.0), ('momentum', 1.0), ('weight_decay', -1.0), ('trust', 0.0)],
)
def test_options_outside_their_range(option, value):
    with pytest.raises(ConfigError, match=rf'LARS\.{option} is out of range'):
        LARS(parameters(), **{'lr': 1.0, option: value})
