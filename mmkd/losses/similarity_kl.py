"""The peer's similarities between images (DoGo, Bhat et al., CVPRW 2021)."""

import torch.nn.functional as F
from torch import Tensor

from mmkd.registry import MODELS

from .checks import check_axes, check_positive, check_same_shape
from .gather import gather_rows
from .reduction import Loss

Views = tuple[Tensor, Tensor]
"""Projections of the first and the second views of N images, (N, D) each."""


def similarity_kl(
    pred: Views, target: Views, *, temperature: float = 0.1
) -> Tensor:
    r"""Compare how similar two networks find the images, pair by pair.

    .. math::
        L_{i,k} = q_{i,k} (\log q_{i,k} - \log p_{i,k}), \qquad
        p_{i,\cdot} = \mathrm{softmax}_k(\cos(z_i, z'_k) / \tau)

    with :math:`z_i` a network's projection of the first view of image i,
    :math:`z'_k` that of the second view of image k, p of this network and q of
    its peer. The sum of a row is its Kullback-Leibler divergence. In
    distributed training, k runs over the images of all processes.

    Source: Bhat, Arani, Zonooz, "Distill on the Go: Online knowledge
    distillation in self-supervised learning", CVPR workshops 2021,
    https://arxiv.org/abs/2104.09866. As in the official code (NeurAI-Lab/DoGo,
    ``criterion/kl.py``), similarities are taken from first to second views
    alone, :math:`\tau` is .1, and the mean is that over all N² pairs
    (:class:`SimilarityKLLoss`), so that the effective weight falls with the
    size of the batch. That code shows each network views of its own; here both
    networks see the same two.

    Args:
        pred: This network's projections, two of (N, D).
        target: The peer's, two of (N, D'); they get no gradient.
        temperature: :math:`\tau`, above 0.

    Returns:
        The part of each pair in the divergence in nats, (N, N), or (N, R N)
        with R processes; float32. A part can be negative, the sum of a row
        cannot.

    Raises:
        ConfigError: If the temperature is not above 0.
        ShapeError: If the tensors have other axes, or other numbers of
            images.

    Example:
        The peer tells two images apart, this network does not.

        >>> import torch
        >>> from mmkd.losses import similarity_kl
        >>> same, apart = torch.ones(2, 2), torch.eye(2)
        >>> similarity_kl((same, same), (apart, apart)).sum(1)  # about log 2
        tensor([0.6926, 0.6926])
    """
    check_positive('similarity_kl', temperature=temperature)
    for views in (pred, target):
        check_axes('similarity_kl', views[0], 'N D')
        check_same_shape('similarity_kl', first=views[0], second=views[1])
    check_same_shape(
        'similarity_kl',
        'Give both networks the same images.',
        pred=pred[0][:, 0],
        target=target[0][:, 0],
    )
    ours = _similarities(pred, temperature)
    theirs = _similarities(
        (target[0].detach(), target[1].detach()), temperature
    )
    return F.kl_div(ours, theirs, reduction='none', log_target=True)


def _similarities(views: Views, temperature: float) -> Tensor:
    """Return the logarithms of the distribution over images, by image."""
    first, second = (F.normalize(view.float(), dim=1) for view in views)
    return (first @ gather_rows(second).T / temperature).log_softmax(1)


@MODELS.register_module()
class SimilarityKLLoss(Loss):
    r"""Weight and reduce :func:`similarity_kl`, which DoGo uses.

    Args:
        temperature: :math:`\tau`, above 0.
        reduction: ``'none'``, ``'mean'`` or ``'sum'`` over the pairs of
            images.
        loss_weight: Factor of the result, :math:`\lambda`.

    Raises:
        ConfigError: If an option is outside its range.

    Example:
        >>> import torch
        >>> from mmkd.losses import SimilarityKLLoss
        >>> same, apart = torch.ones(2, 2), torch.eye(2)
        >>> SimilarityKLLoss()((same, same), (apart, apart))  # 2 * .6926 / 4
        tensor(0.3463)
    """

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        reduction: str = 'mean',
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(reduction=reduction, loss_weight=loss_weight)
        check_positive('SimilarityKLLoss', temperature=temperature)
        self.temperature = temperature

    def forward(
        self,
        pred: Views,
        target: Views,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Compare the networks' similarities.

        Args:
            pred: This network's projections, two of (N, D).
            target: The peer's, two of (N, D'); they get no gradient.
            weight: Weights that broadcast to the pairs, (N, N).
            avg_factor: Divides the sum, in place of N².
            reduction_override: Replaces the configured reduction.

        Returns:
            A scalar, or (N, N) without reduction.
        """
        loss = similarity_kl(pred, target, temperature=self.temperature)
        return self.reduce(loss, weight, avg_factor, reduction_override)
