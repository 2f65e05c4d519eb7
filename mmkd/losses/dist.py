"""Relations between and within classes (Huang et al., NeurIPS 2022)."""

import torch
from torch import Tensor

from mmkd.registry import MODELS

from .checks import (
    check_axes,
    check_not_negative,
    check_positive,
    check_same_shape,
)
from .reduction import Loss

EPSILON = 1e-8
"""The official code adds it to the product of two norms."""
REMEDY = 'Select the classes that both networks have first.'


def inter_class_loss(pred: Tensor, target: Tensor) -> Tensor:
    r"""Compute one minus the networks' correlation over classes, by box.

    .. math::
        L_i = 1 - \rho(p^s_{i,:}, p^t_{i,:})

    with :math:`\rho` Pearson's correlation over the C columns.

    Source: Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A
    Stronger Teacher", NeurIPS 2022, https://arxiv.org/abs/2205.10536. The
    official code (hunto/DIST_KD) multiplies the mean by :math:`T^2`, which is
    left to the caller here.

    Args:
        pred: The student's probabilities, (N, C).
        target: The teacher's probabilities, same shape; they get no gradient.

    Returns:
        The distance of each box, from 0 to 2, without unit, (N,). A box whose
        probabilities are all equal has the distance 1.

    Raises:
        ShapeError: If the tensors have other axes or differ in shape.

    Example:
        >>> import torch
        >>> from mmkd.losses import inter_class_loss
        >>> student = torch.tensor([[0.1, 0.2, 0.3]])
        >>> inter_class_loss(student, torch.tensor([[0.1, 0.3, 0.2]]))
        tensor([0.5000])
    """
    check_axes('inter_class_loss', pred, 'N C')
    check_same_shape('inter_class_loss', REMEDY, pred=pred, target=target)
    if not len(pred):
        return pred.sum(1)  # torch.var would warn
    return 1 - _correlation(pred, target.detach(), dim=1)


def intra_class_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    groups: Tensor | None = None,
    number: int = 1,
) -> Tensor:
    r"""Compute one minus the networks' correlation over boxes, by class.

    .. math::
        L = \frac{1}{C} \sum_c (1 - \rho(p^s_{:,c}, p^t_{:,c}))

    with :math:`\rho` Pearson's correlation over the boxes of a column,
    averaged over the groups of boxes.

    Source: as :func:`inter_class_loss`. The weights and the groups are
    ours.

    Args:
        pred: The student's probabilities, (N, C).
        target: The teacher's probabilities, same shape; they get no gradient.
        weight: Weight of each box in the correlation, (N,); 1 by default.
        groups: The group that each box belongs to, (N,), from 0 to G - 1, such
            as its image; by default all boxes are one group.
        number: The number of groups, G.

    Returns:
        The mean distance over classes and over those groups that have boxes,
        a scalar from 0 to 2 without unit; 0 without boxes.

    Raises:
        ShapeError: If the tensors have other axes or differ in shape.

    Example:
        The columns of two classes; the first correlates perfectly, the second
        by 1/2.

        >>> import torch
        >>> from mmkd.losses import intra_class_loss
        >>> student = torch.tensor([[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]])
        >>> teacher = torch.tensor([[0.1, 0.1], [0.2, 0.3], [0.3, 0.2]])
        >>> intra_class_loss(student, teacher)
        tensor(0.2500)
    """
    check_axes('intra_class_loss', pred, 'N C')
    check_same_shape('intra_class_loss', REMEDY, pred=pred, target=target)
    if weight is None and groups is None and len(pred):
        return (1 - _correlation(pred, target.detach(), dim=0)).mean()
    weights = pred.new_ones(len(pred)) if weight is None else weight
    if groups is None:
        groups = torch.zeros(len(pred), dtype=torch.long, device=pred.device)

    def total(values: Tensor) -> Tensor:
        """Add the weighted rows (N, C) of each group, to (G, C)."""
        zeros = values.new_zeros(number, values.shape[1])
        return zeros.index_add(0, groups, weights[:, None] * values)

    count = total(torch.ones_like(weights)[:, None])
    ours, theirs = (
        p - (total(p) / count.clamp(min=EPSILON))[groups]
        for p in (pred, target.detach())
    )
    # clamp: the root has no gradient at 0
    norms = [
        total(p.square()).clamp(min=EPSILON**2).sqrt() for p in (ours, theirs)
    ]
    correlation = total(ours * theirs) / (norms[0] * norms[1] + EPSILON)
    filled = (count[:, 0] > 0).float()
    distance = (1 - correlation).mean(1)
    return (filled * distance).sum() / filled.sum().clamp(min=1)


def _correlation(pred: Tensor, target: Tensor, dim: int) -> Tensor:
    """Compute Pearson's correlations along a dimension.

    It is enough to centre one of the two, which needs no gradient.
    """
    theirs = target - target.mean(dim, keepdim=True)
    theirs = theirs - theirs.mean(dim, keepdim=True)  # what rounding has left
    variance = pred.var(dim, correction=0) * pred.shape[dim]
    # where: the root has no gradient at 0
    ours = variance.where(variance > 0, 1.0).sqrt().where(variance > 0, 0.0)
    norm = ours * torch.linalg.vector_norm(theirs, dim=dim) + EPSILON
    return (pred * theirs).sum(dim) / norm


@MODELS.register_module()
class DISTLoss(Loss):
    r"""Weight and add the two relations of DIST.

    .. math::
        L = T^2 \left(\beta \frac{1}{N} \sum_i L^{inter}_i
            + \gamma \, L^{intra}\right)

    with :func:`inter_class_loss` and :func:`intra_class_loss` of the networks'
    :math:`p = \mathrm{softmax}(z / T)`, or :math:`\sigma(z / T)` with
    ``use_sigmoid``. The second part relates all boxes, so that there is no
    loss of a single box and no ``reduction``.

    Given maps, every position takes the place of a box. This is the module of
    the official code for detection (hunto/MasKD), which compares the class
    map of each level in this way, with T = 1.

    Args:
        beta: Weight of the relation between classes, at least 0.
        gamma: Weight of the relation within classes, at least 0.
        temperature: T, above 0.
        use_sigmoid: The columns are independent binary problems.
        loss_weight: Factor of the result.

    Raises:
        ConfigError: If an option is outside its range.

    Example:
        >>> import torch
        >>> from mmkd.losses import DISTLoss
        >>> student = torch.tensor([[0.1, 0.2, 0.3]]).log()
        >>> teacher = torch.tensor([[0.1, 0.3, 0.2]]).log()
        >>> DISTLoss(gamma=0.0)(student, teacher)
        tensor(0.5000)
    """

    def __init__(
        self,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        use_sigmoid: bool = False,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        check_not_negative('DISTLoss', beta=beta, gamma=gamma)
        check_positive('DISTLoss', temperature=temperature)
        self.beta, self.gamma = beta, gamma
        self.temperature, self.use_sigmoid = temperature, use_sigmoid

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor:
        """Compare the student's logits with the teacher's.

        Args:
            pred: The student's logits, (N, C), or maps (B, C, H, W), which
                are N = B H W boxes.
            target: The teacher's logits, same shape; they get no gradient.
            weight: Weight of each box, (N,).
            avg_factor: Divides the sum of the relations between classes, in
                place of the number of boxes.

        Returns:
            A scalar.

        Raises:
            ShapeError: If the tensors have other axes or differ in shape.
        """
        check_same_shape('DISTLoss', REMEDY, pred=pred, target=target)
        if pred.dim() == 4:
            pred, target = (
                z.movedim(1, -1).flatten(0, 2) for z in (pred, target)
            )
        ours, theirs = (
            z.sigmoid() if self.use_sigmoid else z.softmax(-1)
            for z in (z.float() / self.temperature for z in (pred, target))
        )
        inter = inter_class_loss(ours, theirs)
        inter = self.reduce(inter, weight, avg_factor, 'mean')
        intra = self.loss_weight * intra_class_loss(ours, theirs, weight)
        return self.temperature**2 * (self.beta * inter + self.gamma * intra)
