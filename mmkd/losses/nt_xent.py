"""SimCLR's contrastive loss (Chen et al., ICML 2020)."""

import torch
import torch.nn.functional as F
from mmengine.dist import get_rank
from torch import Tensor

from mmkd.errors import ShapeError
from mmkd.registry import MODELS

from .checks import check_axes, check_positive, check_same_shape
from .gather import gather_rows
from .reduction import Loss

REMEDY = 'Both are views of the same images.'


def nt_xent_loss(
    first: Tensor, second: Tensor, *, temperature: float = 0.1
) -> Tensor:
    r"""Compute how well each view of an image finds the other, by view.

    The normalised, temperature-scaled cross-entropy of the 2N views of N
    images, of which view i has the partner j(i):

    .. math::
        L_i = -\log \frac{\exp(s_{i,j(i)} / \tau)}
            {\sum_{k \ne i} \exp(s_{i,k} / \tau)}, \qquad
        s_{i,k} = \frac{z_i \cdot z_k}{\|z_i\| \|z_k\|}

    In distributed training, the sum runs over the views of all processes, and
    the gradient reaches each of them, as in the official code.

    Source: Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for
    Contrastive Learning of Visual Representations", ICML 2020, eq. 1,
    https://arxiv.org/abs/2002.05709. The official code
    (google-research/simclr) adds the mean over the first views to the mean
    over the second, which is twice the mean of the paper's algorithm 1 that
    :class:`NTXentLoss` takes.

    Args:
        first: Projections of the first views, (N, D), of any length.
        second: Those of the second views, same shape and order.
        temperature: :math:`\tau`, above 0.

    Returns:
        The loss of each view in nats, at least 0, (2N,): the first views,
        then the second; float32.

    Raises:
        ConfigError: If the temperature is not above 0.
        ShapeError: If the tensors have other axes or differ in shape, or if
            there are fewer than two images, so that nothing is contrasted.

    Example:
        Four directions at right angles: each view is as close to its partner
        as to the others, of which there are three.

        >>> import torch
        >>> from mmkd.losses import nt_xent_loss
        >>> views = torch.eye(4)
        >>> nt_xent_loss(views[:2], views[2:])  # log 3
        tensor([1.0986, 1.0986, 1.0986, 1.0986])
    """
    check_positive('nt_xent_loss', temperature=temperature)
    check_axes('nt_xent_loss', first, 'N D')
    check_same_shape('nt_xent_loss', REMEDY, first=first, second=second)
    ours = F.normalize(torch.cat([first, second]).float(), dim=1)
    everyone = gather_rows(ours)
    if len(everyone) < 4:
        raise ShapeError(
            f'nt_xent_loss contrasts images with each other, got {len(first)}'
            ': the loss would be 0 whatever the network does. Use batches of '
            'at least 2 images.'
        )
    count, views = len(first), len(ours)
    row = torch.arange(views, device=ours.device)
    begin = get_rank() * views
    similarity = ours @ everyone.T / temperature
    # A view is not contrasted with itself.
    similarity = similarity.scatter(1, begin + row[:, None], -torch.inf)
    partner = begin + (row + count) % views
    return F.cross_entropy(similarity, partner, reduction='none')


@MODELS.register_module()
class NTXentLoss(Loss):
    r"""Weight and reduce :func:`nt_xent_loss`, which ``mmkd pretrain`` uses.

    Args:
        temperature: :math:`\tau`, above 0; .1 in SimCLR on ImageNet, .5 on
            CIFAR-10.
        reduction: ``'none'``, ``'mean'`` or ``'sum'`` over the 2N views.
        loss_weight: Factor of the result.

    Raises:
        ConfigError: If an option is outside its range.

    Example:
        Both views are equal, and opposite to those of the other image.

        >>> import torch
        >>> from mmkd.losses import NTXentLoss
        >>> views = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> NTXentLoss(temperature=1.0)(views, views)  # log(1 + 2 / e**2)
        tensor(0.2395)
    """

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        reduction: str = 'mean',
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(reduction=reduction, loss_weight=loss_weight)
        check_positive('NTXentLoss', temperature=temperature)
        self.temperature = temperature

    def forward(
        self,
        first: Tensor,
        second: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Contrast two views of the same images, which both get gradients.

        Args:
            first: Projections of the first views, (N, D).
            second: Those of the second views, same shape and order.
            weight: Weight of each view, (2N,).
            avg_factor: Divides the sum, in place of 2N.
            reduction_override: Replaces the configured reduction.

        Returns:
            A scalar, or (2N,) without reduction.
        """
        loss = nt_xent_loss(first, second, temperature=self.temperature)
        return self.reduce(loss, weight, avg_factor, reduction_override)
