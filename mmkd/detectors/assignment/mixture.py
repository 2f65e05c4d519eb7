"""Mixtures of two Gaussians, fitted to the costs of all objects at once."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-3
MAX_ITERATIONS = 100
REGULARISATION = 1e-6
"""The defaults of scikit-learn's ``GaussianMixture``."""
STEPS_BETWEEN_CHECKS = 8
"""On a GPU, each check whether all fits have converged is a wait."""


@dataclass
class Mixtures:
    """M fitted mixtures, evaluated at their own samples.

    Values of samples that are masked out have no meaning.
    """

    component: Tensor
    """(M, L); component 0 started at the cheapest sample."""
    log_density: Tensor
    """(M, L), float64, up to a constant in each mixture."""
    steps: Tensor
    """(M,), the number of EM steps of each mixture."""


def fit_mixtures(values: Tensor, mask: Tensor) -> Mixtures:
    r"""Fit one mixture of two 1-D Gaussians to each row, all rows at once.

    This is expectation-maximisation as in scikit-learn's
    ``GaussianMixture(2, covariance_type='diag')``. The means start at the
    row's smallest and largest value, the weights at 0.5 and the precisions
    at 1. It ends when the mean log-likelihood changes by less than 1e-3, or
    after 100 steps. Each variance is regularised by 1e-6.

    In contrast to scikit-learn, values are float64 and counted from the
    smallest of the row, so that identical or distant values lose no digits.
    (scikit-learn refuses to fit where rounding makes a variance negative.)

    Args:
        values: (M, L) finite costs.
        mask: (M, L) which of them are samples. A row without any gives
            values without meaning, and raises no error.

    Returns:
        The component and log-density of each sample.
    """
    rows = len(values)
    if values.numel() == 0:
        return Mixtures(
            component=values.new_zeros(values.shape, dtype=torch.long),
            log_density=values.double(),
            steps=values.new_zeros(rows, dtype=torch.long),
        )
    x = values.double()
    smallest = x.masked_fill(~mask, math.inf).amin(1, keepdim=True)
    x = (x - smallest).masked_fill(~mask, 0)
    n = mask.sum(1).clamp(min=1).double()
    # The component comes first, so that sums run along contiguous samples.
    means = torch.stack([torch.zeros_like(n), x.amax(1)])
    weights, variances = torch.full_like(means, 0.5), torch.ones_like(means)
    bound = torch.full_like(n, -math.inf)
    active = torch.ones(rows, dtype=torch.bool, device=x.device)
    steps = torch.zeros(rows, dtype=torch.long, device=x.device)
    every = STEPS_BETWEEN_CHECKS if x.is_cuda else 1
    for step in range(MAX_ITERATIONS):
        joint = _log_joint(x, weights, means, variances)
        density = torch.logaddexp(joint[0], joint[1])
        fitted = _maximise(x, (joint - density).exp() * mask)
        weights = torch.where(active, fitted[0], weights)
        means = torch.where(active, fitted[1], means)
        variances = torch.where(active, fitted[2], variances)
        steps += active
        reached = (density * mask).sum(1) / n
        active = active & ((reached - bound).abs() >= TOLERANCE)
        bound = reached
        if step % every == every - 1 and not active.any():
            break
    joint = _log_joint(x, weights, means, variances)
    return Mixtures(
        component=(joint[1] > joint[0]).long(),
        log_density=torch.logaddexp(joint[0], joint[1]),
        steps=steps,
    )


def _log_joint(
    x: Tensor, weights: Tensor, means: Tensor, variances: Tensor
) -> Tensor:
    """Return log(weight * density) per component and sample, (2, M, L)."""
    distance = (x - means[..., None]) ** 2 / variances[..., None]
    constant = weights.log() - 0.5 * (2 * math.pi * variances).log()
    return constant[..., None] - 0.5 * distance


def _maximise(
    x: Tensor, responsibility: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, means and variances (2, M) by responsibilities."""
    # An empty component would divide by 0.
    count = responsibility.sum(2) + 10 * torch.finfo(x.dtype).eps
    means = (responsibility * x).sum(2) / count
    spread = (x - means[..., None]) ** 2
    variances = (responsibility * spread).sum(2) / count + REGULARISATION
    return count / count.sum(0), means, variances


def positive_samples(
    costs: Tensor, mask: Tensor, *, keep_single: bool = False
) -> Tensor:
    """Return which candidates of each object are positive, as in PAA.

    Two Gaussians are fitted to the costs of an object's candidates. The
    candidates of the cheaper component, up to the one of highest density, are
    positive.

    No case is an error: an object with fewer than two candidates has no
    positive (see ``keep_single``), a candidate whose cost is NaN or infinite
    does not count, and of identical costs the first is positive.

    Source: Kim and Lee, "Probabilistic Anchor Assignment with IoU Prediction
    for Object Detection", ECCV 2020, scheme (c) of its figure 3, as in
    MMDetection's ``PAAHead``.

    Args:
        costs: (M, L), the candidates of M objects in ascending order.
        mask: (M, L), which entries are candidates.
        keep_single: Make an object's only candidate positive. MMDetection
            and the official code of LAD and CoLAD give such an object none.

    Returns:
        (M, L) bool.
    """
    mask = mask & costs.isfinite()
    fitted = fit_mixtures(costs, mask)
    cheaper = mask & (fitted.component == 0)
    density = fitted.log_density.masked_fill(~cheaper, -math.inf)
    if costs.numel() == 0:
        return mask
    place = torch.arange(costs.shape[1], device=costs.device)
    last = density.argmax(1, keepdim=True)
    several = mask.sum(1, keepdim=True) > 1
    positive = cheaper & (place <= last) & several
    return positive | (mask & ~several) if keep_single else positive
