"""LARS: a learning rate for each layer (You et al., 2017)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mmkd.errors import ConfigError
from mmkd.registry import OPTIMIZERS


@OPTIMIZERS.register_module()
class LARS(Optimizer):
    r"""Scale the learning rate of each layer by the size of its weights.

    For weights w with the gradient g:

    .. math::
        d = g + \beta w, \qquad
        r = \eta \frac{\|w\|}{\|d\|}, \qquad
        v \leftarrow m v + \lambda r d, \qquad
        w \leftarrow w - v

    with the learning rate :math:`\lambda`, the weight decay :math:`\beta` and
    the momentum m; r is 1 where a norm is 0. Vectors, which are biases and the
    parameters of norms, have neither weight decay nor a rate of their own
    (:math:`d = g`, r = 1).

    Source: You, Gitman, Ginsburg, "Large Batch Training of Convolutional
    Networks", 2017, https://arxiv.org/abs/1708.03888, as the official code of
    SimCLR has it (google-research/simclr, ``tf2/lars_optimizer.py``): the
    learning rate is part of the momentum, the norm is that of the gradient
    with the decay, :math:`\eta` is .001.

    Args:
        params: As every optimiser takes them.
        lr: :math:`\lambda`, above 0.
        momentum: m, from 0 to below 1.
        weight_decay: :math:`\beta`, at least 0.
        trust: :math:`\eta`, above 0.

    Raises:
        ConfigError: If an option is outside its range.

    Example:
        A weight of norm 5 with a gradient of norm 10: it moves by
        .001 * 5 / 10 of the gradient.

        >>> import torch
        >>> from mmkd.pretrain.lars import LARS
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> weight.grad = torch.tensor([[6.0, 8.0]])
        >>> LARS([weight], lr=1.0).step()
        >>> weight.data
        tensor([[2.9970, 3.9960]])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        for name, value, right in (
            ('lr', lr, lr > 0),
            ('momentum', momentum, 0 <= momentum < 1),
            ('weight_decay', weight_decay, weight_decay >= 0),
            ('trust', trust, trust > 0),
        ):
            if not right:
                raise ConfigError(f'LARS.{name} is out of range: {value!r}.')
        options = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust
        )
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; nothing waits for the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            used = [p for p in group['params'] if p.grad is not None]
            layers = [p for p in used if p.dim() > 1]
            vectors = [p for p in used if p.dim() <= 1]
            if layers:
                self._move(layers, self._adapted(layers, group), group)
            if vectors:
                gradients = [p.grad * group['lr'] for p in vectors]
                self._move(vectors, gradients, group)
        return loss

    def _adapted(
        self, layers: list[Tensor], group: dict[str, Any]
    ) -> list[Tensor]:
        """Return the gradients with the decay, times the layers' rates."""
        gradients = [p.grad for p in layers if p.grad is not None]
        decayed = torch._foreach_add(
            gradients, layers, alpha=group['weight_decay']
        )
        sizes = torch.stack(torch._foreach_norm(layers))
        theirs = torch.stack(torch._foreach_norm(decayed))
        ratio = group['trust'] * sizes / theirs
        ratio = ratio.where((sizes > 0) & (theirs > 0), 1.0) * group['lr']
        torch._foreach_mul_(decayed, list(ratio.unbind()))
        return list(decayed)

    def _move(
        self,
        parameters: list[Tensor],
        steps: list[Tensor],
        group: dict[str, Any],
    ) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state['momentum_buffer'] = torch.zeros_like(parameter)
        moved = [self.state[p]['momentum_buffer'] for p in parameters]
        torch._foreach_mul_(moved, group['momentum'])
        torch._foreach_add_(moved, steps)
        torch._foreach_sub_(parameters, moved)
