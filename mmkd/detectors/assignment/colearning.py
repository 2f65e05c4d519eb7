"""One assignment for several networks, and who provides which costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkd.errors import ConfigError
from mmkd.registry import INDICATORS
from mmkd.utils import nearest

from .mixture import fit_mixtures
from .paa import Candidates, rank_in_group

Indicator = Callable[[Tensor, Tensor, int], Tensor]
"""A function from costs (P,), their groups (P,) and the number of groups G
to a score for each group (G,)."""


@dataclass
class Switched:
    """The costs on which the networks agree."""

    costs: Tensor
    """(P,), each candidate's cost by the network of its group."""
    share: Tensor
    """(K,), the share of all groups that each network has decided."""


def find_indicator(name: str, where: str) -> Indicator:
    """Return the registered indicator of a name.

    Raises:
        ConfigError: If there is none; the message has the nearest name.
    """
    INDICATORS.import_from_location()
    found = INDICATORS.get(name)
    if found is None:
        raise ConfigError(
            f'{where} "{name}" is not registered. '
            f'{nearest(name, INDICATORS.module_dict)}'
        )
    return found


@INDICATORS.register_module(name='std_mean')
def std_mean(costs: Tensor, groups: Tensor, number: int) -> Tensor:
    r"""Score by the spread over the mean, :math:`\sigma / \mu`, of costs.

    The deviation is unbiased; a group of one has none (NaN).

    Source: Nguyen et al., WACV 2022, eq. 4, as in the official code.
    """
    costs = costs.double()
    count = _sums(torch.ones_like(costs), groups, number)
    mean = _sums(costs, groups, number) / count
    spread = _sums((costs - mean[groups]) ** 2, groups, number)
    return (spread / (count - 1)).sqrt() / mean


@INDICATORS.register_module(name='fisher')
def fisher(costs: Tensor, groups: Tensor, number: int) -> Tensor:
    r"""Score by how far the two parts of a group's costs are apart.

    .. math:: (\mu^+ - \mu^-)^2 / (\sigma^{+2} + \sigma^{-2})

    The parts are those of a mixture of two Gaussians that is fitted to the
    group. The deviations are unbiased, and a part of one candidate has none.

    Source: Nguyen et al., WACV 2022, the paper's second criterion. The
    official code has none: the parts and the deviations are UNVERIFIED.
    """
    order = groups.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = rank_in_group(groups[order])
    width = int(rank.max()) + 1 if len(rank) else 0
    table = costs.new_zeros(number, width)
    mask = torch.zeros(number, width, dtype=torch.bool, device=costs.device)
    table[groups, rank] = costs
    mask[groups, rank] = costs.isfinite()
    component = fit_mixtures(table.nan_to_num(0, 0, 0), mask).component
    parts = groups * 2 + component[groups, rank]
    x = costs.double()
    count = _sums(torch.ones_like(x), parts, 2 * number)
    mean = _sums(x, parts, 2 * number) / count.clamp(min=1)
    spread = _sums((x - mean[parts]) ** 2, parts, 2 * number)
    variance = spread / (count - 1).clamp(min=1)
    near, far = mean.view(-1, 2).unbind(1)
    both = (count.view(-1, 2) > 0).all(1)
    score = (far - near) ** 2 / variance.view(-1, 2).sum(1).clamp(min=1e-12)
    return score.where(both, 0)


def switch(
    candidates: Candidates, costs: Sequence[Tensor], indicator: Indicator
) -> Switched:
    """Take each group's costs from the network with the larger indicator.

    A group consists of the candidates of one object at one level. The cost of
    a single candidate comes from the network to which it is cheaper. Where
    indicators are equal, the first network provides the costs. A network
    whose indicator is not a number, or whose costs are not finite, does not.

    Args:
        candidates: The P pre-assigned anchors.
        costs: The costs (P,) of each of the K networks.
        indicator: The function that scores groups.
    """
    levels = candidates.number_of_levels
    groups = candidates.objects * levels + candidates.levels
    number = candidates.number_of_objects * levels
    each = torch.stack(list(costs)).double()
    scores = torch.stack([indicator(row, groups, number) for row in each])
    scores = scores.nan_to_num(-torch.inf, posinf=torch.inf)
    count = _sums(torch.ones_like(each[0]), groups, number)
    single = torch.stack([_sums(row, groups, number) for row in each])
    scores = torch.where(count == 1, -single.nan_to_num(torch.inf), scores)
    chosen = scores.argmax(0)
    exists = count > 0
    share = torch.stack(
        [((chosen == k) & exists).sum() for k in range(len(each))]
    ) / exists.sum().clamp(min=1)
    return Switched(
        costs=each.gather(0, chosen[groups][None])[0].to(costs[0].dtype),
        share=share,
    )


def _sums(values: Tensor, groups: Tensor, number: int) -> Tensor:
    return values.new_zeros(number).index_add(0, groups, values)
