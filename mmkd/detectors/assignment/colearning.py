"""One assignment for several networks: who provides which costs."""

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
"""Costs (P,), their groups (P,), number of groups G to a score (G,)."""


@dataclass
class Switched:
    """The costs on which networks agree."""

    costs: Tensor
    """(P,), each candidate's cost in the eyes of its group's network."""
    share: Tensor
    """(K,), the share of all groups that each network has decided."""


def find_indicator(name: str, where: str) -> Indicator:
    """The registered indicator of a name.

    Raises:
        ConfigError: If there is none; says the nearest.
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
    r"""Spread over mean, :math:`\sigma / \mu`, of a group's costs.

    The deviation is the unbiased one; a group of one has none (NaN).

    Source: Nguyen et al., WACV 2022, eq. 4, as in the official code.
    """
    costs = costs.double()
    count = _sums(torch.ones_like(costs), groups, number)
    mean = _sums(costs, groups, number) / count
    spread = _sums((costs - mean[groups]) ** 2, groups, number)
    return (spread / (count - 1)).sqrt() / mean


@INDICATORS.register_module(name='fisher')
def fisher(costs: Tensor, groups: Tensor, number: int) -> Tensor:
    r"""How far the two parts of a group's costs lie apart.

    .. math:: (\mu^+ - \mu^-)^2 / (\sigma^{+2} + \sigma^{-2})

    The parts are those of a mixture of two Gaussians fitted to the group,
    the deviations unbiased, a part of one candidate without any.

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

    A group is the candidates of one object at one level. With a single
    candidate, the network to which it is cheaper provides it. Where
    indicators are equal, the first network does; one whose indicator is not
    a number (costs that are not finite, too) does not.

    Args:
        candidates: P pre-assigned anchors.
        costs: (P,) of each of the K networks.
        indicator: Scores groups.
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
