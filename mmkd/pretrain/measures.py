"""How good a representation is, without training anything on it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 20
SHARPNESS = 0.07
"""The temperature of the neighbours' votes."""


def knn_accuracy(
    features: Tensor,
    labels: Tensor,
    images: Tensor,
    neighbours: int = NEIGHBOURS,
) -> tuple[float, float]:
    r"""Classify each object by those nearest to it in other images.

    The nearest neighbours by cosine similarity vote for their classes, each
    with the weight :math:`\exp(\cos / .07)`. Objects of the same image are no
    neighbours: they share its light and background.

    Source: Wu, Xiong, Yu, Lin, "Unsupervised Feature Learning via
    Non-Parametric Instance Discrimination", CVPR 2018,
    https://arxiv.org/abs/1805.01978, with its temperature; k is 20.

    Args:
        features: (N, D), of any length.
        labels: The class of each object, (N,), from 0.
        images: The image of each object, (N,).
        neighbours: k; fewer vote where there are fewer.

    Returns:
        The part of the objects that are classified rightly, and its mean over
        the classes, in which rare ones count as much as frequent ones.

    Example:
        >>> import torch
        >>> from mmkd.pretrain.measures import knn_accuracy
        >>> features = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0, 2]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> knn_accuracy(features, labels, torch.arange(4), neighbours=1)
        (1.0, 1.0)
    """
    unit = F.normalize(features.float(), dim=1)
    similar = unit @ unit.T
    similar = similar.masked_fill(images[:, None] == images, -torch.inf)
    nearest, index = similar.topk(min(neighbours, len(unit)), dim=1)
    count = int(labels.max()) + 1
    # exp(-inf) is 0: no vote
    votes = (nearest / SHARPNESS).exp()
    votes = votes.new_zeros(len(unit), count).scatter_add(
        1, labels[index], votes
    )
    right = (votes.argmax(1) == labels).float()
    found = torch.bincount(labels, right, count)
    total = torch.bincount(labels, minlength=count)
    there = total > 0
    by_class = found[there] / total[there]
    return right.mean().item(), by_class.mean().item()


def alignment(first: Tensor, second: Tensor) -> float:
    r"""Return the mean squared distance of two views of the same images.

    .. math::
        \frac{1}{N} \sum_i \|z_i - z'_i\|^2, \qquad \|z\| = 1

    Source: Wang, Isola, "Understanding Contrastive Representation Learning
    through Alignment and Uniformity on the Hypersphere", ICML 2020,
    https://arxiv.org/abs/2005.10242, with its exponent 2.

    Args:
        first: (N, D), of any length.
        second: Same shape and order.

    Returns:
        From 0 to 4; the lower, the less the augmentations matter.

    Example:
        >>> import torch
        >>> from mmkd.pretrain.measures import alignment
        >>> alignment(torch.eye(2), torch.eye(2).flip(0))
        2.0
    """
    ours, theirs = (F.normalize(z.float(), dim=1) for z in (first, second))
    return (ours - theirs).square().sum(1).mean().item()


def uniformity(features: Tensor) -> float:
    r"""Return how evenly the representations of images are spread.

    .. math::
        \log \frac{2}{N (N - 1)} \sum_{i < k} e^{-2 \|z_i - z_k\|^2},
        \qquad \|z\| = 1

    Source: as :func:`alignment`, with its t = 2.

    Args:
        features: (N, D), of any length, N at least 2.

    Returns:
        From -8 to 0; 0 if all are the same, the lower, the more even.

    Example:
        >>> import torch
        >>> from mmkd.pretrain.measures import uniformity
        >>> round(uniformity(torch.eye(2)), 3)
        -4.0
    """
    unit = F.normalize(features.float(), dim=1)
    squares = torch.pdist(unit).square()
    return squares.mul(-2).logsumexp(0).item() - math.log(len(squares))
