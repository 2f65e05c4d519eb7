"""Statistics of feature maps whose padding does not count."""

import pytest
import torch

from mmkd.losses.maps import full_weights, standardize
from tests.helpers.feature_maps import weights_of


@pytest.mark.parametrize('per_image', [False, True])
def test_standard_channels(per_image):
    maps = 5 + 3 * torch.randn(2, 3, 4, 6)
    weights = weights_of([(4, 6), (2, 5)], 4, 6)
    result, averaging = standardize(
        maps, weights, per_image=per_image, eps=1e-12
    )
    images = [result[0].flatten(1), result[1, :, :2, :5].flatten(1)]
    if not per_image:
        images = [torch.cat(images, dim=1)]
        assert averaging.sum().item() == pytest.approx(1)
    for values in images:
        assert values.mean(1).abs().max() < 1e-5
        assert (values.std(1, unbiased=False) - 1).abs().max() < 1e-5
    assert (averaging[1, :, 2:] == 0).all()
    assert (averaging[1, :, :, 5:] == 0).all()


def test_a_constant_channel_stays_finite():
    maps = torch.full((1, 2, 3, 3), 4.0, requires_grad=True)
    result, _ = standardize(
        maps, weights_of([(3, 3)], 3, 3), per_image=False, eps=1e-12
    )
    assert (result == 0).all()
    result.sum().backward()
    assert (maps.grad == 0).all()


def test_full_weights_average():
    weights = full_weights(torch.zeros(2, 3, 4, 6, dtype=torch.half))
    assert torch.equal(weights, weights_of([(4, 6)] * 2, 4, 6))
