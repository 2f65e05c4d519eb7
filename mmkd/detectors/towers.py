"""The two towers of dense heads such as RetinaNet, FCOS, ATSS and GFL."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmcv.cnn import ConvModule
from torch import Tensor, nn

from mmkd.errors import ConfigError

from .dense import DenseOutputs, read_dense
from .facts import DenseFacts

TOWERS = ('cls_convs', 'reg_convs')
"""The tower of the classes and the tower of the boxes."""


def tower_path(
    facts: DenseFacts, tower: str, layer: int, *, activated: bool
) -> str:
    """Return where the feature of a layer is tapped.

    Args:
        facts: The facts of the head.
        tower: One of :data:`TOWERS`.
        layer: The number of layers before it; 0 for the neck's maps.
        activated: Whether after the layer's activation, or else before it:
            after its norm, if it has one.
    """
    if layer == 0:
        return 'neck'
    path = f'bbox_head.{tower}.{layer - 1}'
    if activated:
        return path
    module = getattr(facts.head, tower)[layer - 1]
    return f'{path}.norm' if module.with_norm else f'{path}.conv'


def tower_depth(model: Any) -> int:
    """Return the number of layers in the shorter tower of a dense head.

    Args:
        model: A detector; 0 if its head has no such towers.
    """
    head = getattr(model, 'bbox_head', None)
    towers = [getattr(head, tower, None) for tower in TOWERS]
    if any(not isinstance(layers, nn.ModuleList) for layers in towers):
        return 0
    return min(len(layers) for layers in towers if layers is not None)


def quality_tower(facts: DenseFacts) -> str:
    """Return the tower that centerness or IoU is predicted from."""
    return TOWERS[getattr(facts.head, 'centerness_on_reg', True)]


def activation(facts: DenseFacts, tower: str, layer: int) -> nn.Module:
    """Return what a layer (counted from 1) does after its norm."""
    return getattr(facts.head, tower)[layer - 1].activate


def cross(
    facts: DenseFacts,
    layer: int,
    features: Mapping[str, Sequence[Tensor]],
    maps: tuple[Tensor, ...],
) -> DenseOutputs:
    """Pass given features through the rest of a head.

    Args:
        facts: The facts of the head, which is not changed.
        layer: The number of layers that are left out.
        features: For each tower, the input of its first remaining layer, a
            tensor per level. A tower without input is not run.
        maps: The neck's levels.
    """
    return read_dense(facts, from_layer(facts.head, layer, features)(maps))


class Feed(nn.Module):
    """Returns the levels' features one by one, whatever its input is."""

    def __init__(self, features: Sequence[Tensor]) -> None:
        super().__init__()
        self.features = iter(features)

    def forward(self, _: Tensor) -> Tensor:
        return next(self.features)


class Idle(nn.Module):
    """A tower that no loss reads: it gives NaN for one image at low cost."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, level: Tensor) -> Tensor:
        return level.new_full((1, self.width, *level.shape[2:]), math.nan)


def from_layer(
    head: Any, layer: int, features: Mapping[str, Sequence[Tensor]]
) -> Any:
    """Return a dense head whose towers start after a layer.

    Args:
        head: The head, which shares its modules with the result and is not
            changed.
        layer: The number of layers that are left out.
        features: For each tower, the input of its first remaining layer, a
            tensor per level. They are consumed in one call. A tower that is
            left out is :class:`Idle`.
    """
    result = copy.copy(head)
    towers = {t: nn.ModuleList([Idle(head.feat_channels)]) for t in TOWERS}
    for tower, levels in features.items():
        remaining = getattr(head, tower)[layer:]
        towers[tower] = nn.ModuleList([Feed(levels), *remaining])
    # This bypasses nn.Module, which would change the head's own dict.
    result.__dict__['_modules'] = {**head._modules, **towers}
    return result


def check_towers(
    dense: DenseOutputs, role: str, layer: int, method: str
) -> None:
    """Check that a head has towers that can be cut, and boxes.

    Raises:
        ConfigError: If it has not; the message says which heads fit.
    """
    reason = _why_unfit(dense.facts.head, layer)
    if not dense.sigmoid:
        reason = 'has a softmax'
    if dense.bins is None and (
        dense.facts.coder is None
        or dense.regression is None
        or dense.regression.shape[-1] != 4
    ):
        reason = 'regresses neither bins nor four numbers per prior'
    if reason is not None:
        raise ConfigError(
            f'{method} fits dense heads like RetinaNet, FCOS, ATSS and GFL, '
            f"with layer={layer}; the {role}'s {dense.facts.kind} {reason}."
        )


def _why_unfit(head: Any, layer: int) -> str | None:
    if head is None:
        return 'is not a head of MMDetection, so nothing can pass through it'
    reason = None
    for tower in TOWERS:
        layers = getattr(head, tower, None)
        if not isinstance(layers, nn.ModuleList) or not all(
            isinstance(conv, ConvModule)
            and conv.with_activation
            and conv.order == ('conv', 'norm', 'act')
            for conv in layers
        ):
            reason = f'has no {tower} of ConvModules that the levels share'
        elif len(layers) < layer:
            reason = (
                f'has {len(layers)} layers in its {tower}: set layer to '
                f'{len(layers)} or less'
            )
    return reason
