"""SimCLR's augmentations, measured on the images that they give."""

import ast

import pytest
import torch

from mmkd.errors import ConfigError, PackageError
from mmkd.pretrain import augment
from mmkd.pretrain.augment import Distortion, check_crops, random_crops
from tests.helpers.toy import ROOT

pytest.importorskip('kornia')
GREY = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
MANY = 400


def ramp(height, width):
    """A picture whose red is x, and whose green is y."""
    picture = torch.zeros(3, height, width, dtype=torch.uint8)
    picture[0] = torch.arange(width)
    picture[1] = torch.arange(height)[:, None]
    return picture


class TestCrops:
    def test_are_parts_of_the_picture(self):
        """Their corners tell where they were, to about a pixel."""
        torch.manual_seed(0)
        height, width, size = 200, 256, 64
        crops = random_crops(ramp(height, width), 60, size, (0.1, 0.5)).float()
        assert crops.shape == (60, 3, size, size)
        areas, ratios = [], []
        for x, y, _ in crops:
            assert (x - x[0]).abs().max() <= 1  # nothing is turned
            assert (y.T - y[:, 0]).abs().max() <= 1
            # from the middle of the first pixel to that of the last
            factor = size / (size - 1)
            w = (x[0, -1] - x[0, 0]).item() * factor
            h = (y[-1, 0] - y[0, 0]).item() * factor
            assert 0 < w <= width
            assert 0 < h <= height
            areas.append(w * h / (height * width))
            ratios.append(w / h)
        assert 0.09 < min(areas) < 0.16
        assert 0.42 < max(areas) < 0.53
        assert 0.71 < min(ratios) < 0.85
        assert 1.18 < max(ratios) < 1.40

    def test_follow_the_seed(self):
        picture = ramp(60, 80)

        def drawn(seed):
            torch.manual_seed(seed)
            return random_crops(picture, 2, 32, (0.08, 1.0))

        assert torch.equal(drawn(1), drawn(1))
        assert not torch.equal(drawn(1), drawn(2))
        first, second = drawn(1)
        assert not torch.equal(first, second)

    def test_of_a_picture_that_is_smaller(self):
        torch.manual_seed(0)
        crops = random_crops(ramp(9, 12), 20, 32, (0.08, 1.0))
        assert crops.shape == (20, 3, 32, 32)
        assert crops[:, 0].max() <= 11
        assert crops[:, 1].max() <= 8

    @pytest.mark.parametrize('scale', [(0.0, 1.0), (0.5, 0.2), (0.1, 1.1)])
    def test_wrong_parts(self, scale):
        with pytest.raises(ConfigError, match='--crop-scale must be two'):
            check_crops(96, scale)

    def test_too_small(self):
        with pytest.raises(ConfigError, match='--size must be at least 32'):
            check_crops(16, (0.1, 1.0))


class TestDistortion:
    @pytest.fixture
    def images(self):
        generator = torch.Generator().manual_seed(0)
        return torch.rand(1, 3, 32, 32, generator=generator).expand(
            MANY, -1, -1, -1
        )

    def test_half_are_mirrored_and_a_fifth_is_grey(self, images):
        torch.manual_seed(0)
        image = images[0]
        grey = (image * GREY).sum(0, keepdim=True).expand(3, -1, -1)
        expected = torch.stack([image, image.flip(2), grey, grey.flip(2)])
        found = Distortion(size=32, strength=0.0, blur=0.0)(images)
        distance = (found[:, None] - expected).abs().amax((2, 3, 4))
        assert distance.amin(1).max() < 1e-4  # nothing else comes out
        counts = torch.bincount(distance.argmin(1), minlength=4) / MANY
        # within four standard deviations of .4, .4, .1, .1
        assert (counts[:2] - 0.4).abs().max() < 0.1
        assert (counts[2:] - 0.1).abs().max() < 0.06

    def test_four_fifths_change_colour(self, images):
        torch.manual_seed(0)
        found = Distortion(size=32, strength=1.0, blur=0.0)(images)
        assert found.min() >= 0
        assert found.max() <= 1
        coloured = found[(found[:, 0] - found[:, 1]).abs().amax((1, 2)) > 1e-3]
        same = torch.stack([images[0], images[0].flip(2)])
        kept = (coloured[:, None] - same).abs().amax((2, 3, 4)).amin(1) < 1e-4
        assert 0.1 < kept.float().mean() < 0.3

    def test_half_are_blurred(self, images):
        """The neighbours of a blurred picture of noise differ less."""
        torch.manual_seed(0)
        found = Distortion(size=64, strength=0.0, blur=0.5)(images)
        sharp = [images[0], (images[0] * GREY).sum(0).expand(3, -1, -1)]
        steps = [(s[..., 1:] - s[..., :-1]).abs().mean() for s in sharp]
        theirs = (found[..., 1:] - found[..., :-1]).abs().mean((1, 2, 3))
        as_sharp = [(theirs / s - 1).abs() < 1e-3 for s in steps]
        blurred = ~(as_sharp[0] | as_sharp[1])
        # sigma from .1 on: the weakest blurs change nothing visible
        assert 0.35 < blurred.float().mean() < 0.6

    def test_follows_the_seed(self, images):
        distort = Distortion(size=32)
        torch.manual_seed(1)
        first = distort(images[:8])
        torch.manual_seed(1)
        assert torch.equal(distort(images[:8]), first)
        assert not torch.equal(distort(images[:8]), first)

    def test_wrong_options(self):
        with pytest.raises(ConfigError, match='--color-strength must be'):
            Distortion(size=32, strength=2.0)
        with pytest.raises(ConfigError, match='--blur must be a probab'):
            Distortion(size=32, blur=1.5)


def test_without_kornia(monkeypatch):
    monkeypatch.setattr(augment, 'find_spec', lambda name: None)
    with pytest.raises(PackageError, match=r"pip install 'mmkd\[pretrain\]'"):
        Distortion(size=32)


def test_nothing_imports_kornia_before_it_is_used():
    """No file of mmkd imports it but inside a function."""
    files = [*(ROOT / 'mmkd').rglob('*.py')]
    assert len(files) > 100
    for path in files:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names]
                names.append(getattr(node, 'module', None) or '')
                assert not any(n.startswith('kornia') for n in names), path
