"""Gradients of single losses, which leave the training as it is."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mmkd.detectors.record import intercepted, replaced, tap, tensors_in
from mmkd.utils import ATTACHED, isolated_random_state


def student_parameters(student: nn.Module) -> list[nn.Parameter]:
    """Return the student's own trainable parameters, without adapters."""
    return [
        parameter
        for name, parameter in student.named_parameters()
        if parameter.requires_grad and not name.startswith(f'{ATTACHED}.')
    ]


@contextmanager
def gradient_edges(
    model: nn.Module, paths: Iterable[str]
) -> Iterator[dict[str, list[GradientEdge]]]:
    """Note where gradients arrive at the outputs of modules.

    Unlike a tensor, an edge is not changed by an activation that works in
    place on the output.

    Args:
        model: The network.
        paths: The paths of modules in it; see ``StepRecord.features``.

    Yields:
        The edges of what the modules give within the context, by path; those
        of outputs that need no gradient are left out.
    """
    edges: dict[str, list[GradientEdge]] = {path: [] for path in paths}

    def note(path: str, output: Any, *_: Any, **__: Any) -> None:
        edges[path] += [
            get_gradient_edge(tensor)
            for tensor in tensors_in(output)
            if tensor.requires_grad
        ]

    with ExitStack() as stack:
        for path in edges:
            found = tap(model, path)
            if found is not None:
                after = functools.partial(note, path)
                stack.enter_context(intercepted(*found, after))
        yield edges


def gradient(
    losses: Iterable[Tensor],
    parameters: Sequence[Tensor | GradientEdge],
    model: nn.Module,
) -> list[Tensor | None]:
    """Compute the gradient of the sum of losses.

    Args:
        losses: Losses of any shape, of which the means are added. Their graph
            is kept.
        parameters: What the gradient is taken with respect to: parameters, or
            :func:`gradient_edges`, which the pass does not go behind.
        model: The network that holds these parameters and all others that the
            losses depend on. Its gradients and buffers stay as they are, also
            where checkpointed blocks run again.

    Returns:
        The gradient of each parameter; None for those it does not reach.
    """
    total = sum(loss.mean() for loss in losses)
    every: dict[int, Any] = {id(p): p for p in parameters}
    if not all(isinstance(each, GradientEdge) for each in parameters):
        every = {id(p): p for p in student_parameters(model)} | every
    if not (isinstance(total, Tensor) and total.requires_grad and every):
        return [None] * len(parameters)
    # Reentrant checkpoints refuse this, because they would add the gradients
    # of what runs within them to the parameters: here, to their copies. All
    # parameters are asked for, because those before a block let it run.
    with (
        untouched(model),
        copied_parameters(model) as copies,
        replaced(torch.autograd, '_is_checkpoint_valid', lambda: True),
        # As in the training, which is out of it by then.
        torch.autocast(total.device.type, enabled=False),
    ):
        found = torch.autograd.grad(
            total, list(every.values()), retain_graph=True, allow_unused=True
        )
    outside = dict(zip(every, found, strict=True))
    inside = {key: copy.grad for key, copy in copies.items()}
    return [
        _added(outside[id(parameter)], inside.get(id(parameter)))
        for parameter in parameters
    ]


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


@contextmanager
def copied_parameters(
    model: nn.Module,
) -> Iterator[dict[int, nn.Parameter]]:
    """Let what runs within use other parameters with the same values.

    Hooks on the parameters, as distributed training has them, then see no
    gradient.

    Yields:
        The copy of each trainable parameter, by the parameter's id.
    """
    held = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    copies = {id(p): nn.Parameter(p.detach()) for _, _, p in held}
    try:
        for owner, name, parameter in held:
            owner[name] = copies[id(parameter)]
        yield copies
    finally:
        for owner, name, parameter in held:
            owner[name] = parameter


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Leave buffers and random states as they were.

    A backward pass runs checkpointed blocks again, and with them their batch
    norms. Buffers are exchanged and not written to, because the graph of the
    training step may hold them.
    """
    buffers = [
        (module._buffers, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        for owner, name, buffer in buffers:
            owner[name] = buffer.clone()
        with isolated_random_state():
            yield
    finally:
        for owner, name, buffer in buffers:
            owner[name] = buffer
