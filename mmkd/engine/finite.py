"""Which numbers of a training are NaN or infinite."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkd.utils import ATTACHED

SMALL = 4096
"""Numbers of a gradient that is read as a whole."""
NAMED = 3
"""How many tensors a message names."""


def finite(tensors: Sequence[Tensor]) -> Tensor:
    """Say of each tensor whether all of its numbers are finite.

    Each tensor is read once. On a CPU the answer is exact. On another device
    nothing waits for it, and it is that of the tensors' Euclidean norms, which
    also overflow where numbers are larger than about 1e19.

    Args:
        tensors: Floating-point tensors of any shapes.

    Returns:
        One bool for each tensor, on the device of the first.

    Example:
        >>> import torch
        >>> from mmkd.engine.finite import finite
        >>> finite([torch.ones(2), torch.tensor([0.0, float('inf')])])
        tensor([ True, False])
    """
    if not tensors:
        return torch.ones(0, dtype=torch.bool)
    dense = [t._values() if t.is_sparse else t for t in tensors]
    device = dense[0].device
    exact = device.type == 'cpu'
    # A sum is as fast as the memory, and NaN or infinite if a number is.
    sums = [t.sum() for t in dense] if exact else torch._foreach_norm(dense)
    found = torch.stack([s.to(device, non_blocking=True) for s in sums])
    answer = found.isfinite()
    if exact and not answer.all():
        for index in (~answer).nonzero().flatten().tolist():
            answer[index] = dense[index].isfinite().all()
    return answer


def shows_finite(gradients: Sequence[Tensor]) -> bool:
    """Say whether parts of gradients on a CPU show that all are finite.

    A pass over all gradients would take several per cent of a small step. The
    gradient of a weight is a sum of products of a layer's inputs with the
    gradients of its outputs. An input that is not finite makes outputs, and so
    the losses, the same. An output whose gradient is not finite leaves no
    finite number in its row, because even the product with 0 is NaN, nor in
    the gradient of its bias or normalisation. Therefore vectors are read as a
    whole and of weights the first row; the first column, too, if most layers
    have no vectors that train. Not shown are a single number that is not
    finite by itself, and sums that overflow.

    Args:
        gradients: Those of all parameters of an optimiser. Weights have the
            shape (outputs, inputs, …), or the reverse.

    Example:
        >>> import torch
        >>> from mmkd.engine.finite import shows_finite
        >>> weight, bias = torch.zeros(64, 128), torch.zeros(64)
        >>> shows_finite([weight, bias])
        True
        >>> shows_finite([weight.fill_(float('inf')), bias])
        False
    """
    vectors = sum(each.dim() < 2 for each in gradients)
    columns = 2 * vectors < len(gradients)
    sums = []
    for each in gradients:
        dense = each.layout is torch.strided
        if not dense or each.dim() < 2 or each.numel() <= SMALL:
            sums.append(each.sum())
        else:
            sums.append(each[0].sum())
            if columns:
                column = each[:, 0]
                while column.dim() > 1:  # padding spares a kernel's middle
                    column = column[:, column.shape[1] // 2]
                sums.append(column.sum())
    return bool(torch.stack(sums).isfinite().all()) if sums else True


class FiniteState:
    """What was not finite when a training began; what else is not by now.

    Some models hold infinite numbers for good reasons, such as masks of
    ``-inf``. Only tensors with more of them, or with more NaN, than at the
    beginning are told. What did not exist then is told if it holds a NaN or,
    as part of an optimiser's state, an infinite number.

    Args:
        state: The state dict of the model when the training begins.
        optimizer: That of its optimisers.
    """

    def __init__(
        self, state: Mapping[str, Any], optimizer: Mapping[str, Any]
    ) -> None:
        named = {n: t for n, _, t in _tensors(state, optimizer)}
        self._known = frozenset(named)
        self._began = {
            name: (named[name].shape, *_counts(named[name]))
            for name in _not_finite(named)
        }

    @property
    def at_the_beginning(self) -> list[str]:
        """The tensors that were not finite when the training began."""
        return list(self._began)

    def problems(
        self, state: Mapping[str, Any], optimizer: Mapping[str, Any]
    ) -> list[str]:
        """Return the tensors that should be finite, and are not.

        Args:
            state: A state dict of the model.
            optimizer: One of its optimisers.
        """
        return self._problems(_tensors(state, optimizer))

    def problems_of(self, checkpoint: Mapping[str, Any]) -> list[str]:
        """Return those of a checkpoint, with the places where they are.

        Args:
            checkpoint: What is to be written, with the weights of the
                distillation under their own key.
        """
        return self._problems(_tensors_of_checkpoint(checkpoint))

    def _problems(
        self, tensors: Iterator[tuple[str, str, Tensor]]
    ) -> list[str]:
        found = {place: (name, t) for name, place, t in tensors}
        return [
            place
            for place in _not_finite({p: t for p, (_, t) in found.items()})
            if self._is_worse(*found[place])
        ]

    def _is_worse(self, name: str, tensor: Tensor) -> bool:
        infinite, nan = _counts(tensor)
        shape, infinite_then, nan_then = self._began.get(name, (None, 0, 0))
        comparable = (
            name in self._known or name.startswith('optimizer.')
            if shape is None
            else shape == tensor.shape
        )
        return nan > nan_then or (comparable and infinite > infinite_then)


def in_words(places: Sequence[str]) -> str:
    """Name the first places, and say how many more there are."""
    more = len(places) - NAMED
    named = ', '.join(places[:NAMED])
    return f'{named} and {more} more' if more > 0 else named


def how_to_go_on(checkpoint: str | None) -> str:
    """Say from which checkpoint a run that diverged can go on, and how.

    Args:
        checkpoint: The last one whose numbers were found to be finite.
    """
    if checkpoint is None:
        return (
            'This run has saved no checkpoint from which it could be resumed.'
        )
    path = shlex.quote(checkpoint)
    return (
        f'The last checkpoint, {checkpoint}, held only finite numbers when it '
        f'was saved or loaded: go on with --resume {path} after a change of '
        'the config, such as optim_wrapper.clip_grad, or with '
        f'load_from={checkpoint!r} and a lower learning rate (a run that is '
        'resumed keeps the one in the checkpoint).'
    )


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    answers = finite(list(tensors.values())).tolist()
    return [n for n, ok in zip(tensors, answers, strict=True) if not ok]


def _counts(tensor: Tensor) -> tuple[int, int]:
    """Return how many numbers are infinite or NaN, and how many are NaN."""
    return int((~tensor.isfinite()).sum()), int(tensor.isnan().sum())


def _tensors(
    state: Mapping[str, Any], optimizer: Mapping[str, Any]
) -> Iterator[tuple[str, str, Tensor]]:
    """Yield each tensor's name, place and value."""
    for name, tensor in _walk(state):
        yield name, name, tensor
    for name, tensor in _walk(optimizer, 'optimizer.'):
        yield name, name, tensor


def _tensors_of_checkpoint(
    checkpoint: Mapping[str, Any],
) -> Iterator[tuple[str, str, Tensor]]:
    attached = checkpoint.get(ATTACHED, {})
    for prefix, holder in ('', checkpoint), (f'{ATTACHED}.', attached):
        for key, module in ('state_dict', ''), ('ema_state_dict', 'module.'):
            for name, tensor in _walk(holder.get(key, {})):
                place = f'{prefix}{key}: {name}'
                yield name.removeprefix(module), place, tensor
    for name, tensor in _walk(checkpoint.get('optimizer', {}), 'optimizer.'):
        yield name, name, tensor


def _walk(value: Any, name: str = '') -> Iterator[tuple[str, Tensor]]:
    """Yield the floating-point tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        floating = value.is_floating_point() or value.is_complex()
        if floating and value.dtype.itemsize > 1:  # float8 cannot be added up
            yield name.rstrip('.'), value.detach()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f'{name}{key}.')
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _walk(item, f'{name}{index}.')
