"""Neighbours, alignment and uniformity beside their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmkd.pretrain.measures import alignment, knn_accuracy, uniformity


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(30, 4, generator=generator)


def cosine(a, b):
    return F.cosine_similarity(a, b, dim=0).item()


@pytest.mark.parametrize('neighbours', [1, 5, 100])
def test_neighbours(features, neighbours):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (30,), generator=generator)
    images = torch.arange(30) // 3
    right = []
    for i in range(30):
        near = sorted(
            (
                (cosine(features[i], features[k]), labels[k].item())
                for k in range(30)
                if images[k] != images[i]
            ),
            reverse=True,
        )[:neighbours]
        votes = dict.fromkeys(range(3), 0.0)
        for similarity, label in near:
            votes[label] += math.exp(similarity / 0.07)
        right.append(max(votes, key=votes.get) == labels[i])
    by_class = [
        sum(r for r, y in zip(right, labels, strict=True) if y == label)
        / (labels == label).sum()
        for label in range(3)
    ]
    found = knn_accuracy(features, labels, images, neighbours)
    assert found[0] == pytest.approx(sum(right) / 30)
    assert found[1] == pytest.approx(sum(by_class).item() / 3)


def test_rare_classes_count_as_much_in_the_mean_over_classes():
    """Nine objects of a class are alike; one of another is among them."""
    features = torch.ones(10, 2)
    labels = torch.tensor([0] * 9 + [1])
    found = knn_accuracy(features, labels, torch.arange(10))
    assert found == pytest.approx((0.9, 0.5))


def test_objects_of_the_same_image_are_no_neighbours():
    """Each object's double is in its own image."""
    features = torch.eye(4).repeat_interleave(2, 0)
    labels = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    images = torch.arange(8) // 2
    apart = knn_accuracy(features, labels, torch.arange(8), 1)
    assert apart == (1.0, 1.0)
    assert knn_accuracy(features, labels, images, 1)[0] < 1


def test_alignment(features):
    other = features.flip(0)
    expected = sum(
        2 - 2 * cosine(a, b) for a, b in zip(features, other, strict=True)
    )
    assert alignment(features, other) == pytest.approx(expected / 30, rel=1e-5)
    assert alignment(features, 5 * features) == pytest.approx(0, abs=1e-6)
    assert alignment(features, -features) == pytest.approx(4, rel=1e-6)


def test_uniformity(features):
    terms = [
        math.exp(-2 * (2 - 2 * cosine(features[i], features[k])))
        for i in range(30)
        for k in range(i)
    ]
    expected = math.log(sum(terms) / len(terms))
    assert uniformity(features) == pytest.approx(expected, rel=1e-5)
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-6)
