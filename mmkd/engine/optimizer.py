"""One optimiser for the student, the methods' layers and the peers."""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import (
    DefaultOptimWrapperConstructor,
    OptimWrapper,
    OptimWrapperDict,
)
from torch import nn

from mmkd.core.distiller import Distiller
from mmkd.errors import ConfigError
from mmkd.peers.peer import Peer, add_to_optimizer, check_trained
from mmkd.utils import ATTACHED

CUSTOM_KEYS = 'optim_wrapper.paramwise_cfg.custom_keys'


def build_for(
    distiller: Distiller, cfg: Any, build: Callable[[Any], Any]
) -> Any:
    """Build the optimiser of a run that distils.

    The settings of the config are the student's: its ``custom_keys`` are
    words in the names of the student's parameters, and a ``constructor`` may
    know nothing but the student. The methods' layers (adapters) are therefore
    added behind it, with :func:`adapter_groups`, and then the peers, each with
    its own settings.

    Args:
        distiller: What is attached to the student.
        cfg: ``optim_wrapper`` of the config, or an optimiser.
        build: Builds the optimiser of all parameters that the student has
            at that moment.

    Raises:
        ConfigError: If an optimiser that is already built leaves out a peer
            or the layers of a method, or if a peer's settings do not fit.
    """
    peers: dict[str, Peer] = dict(distiller.peers)
    if not isinstance(cfg, Mapping) or _is_built(cfg.get('optimizer')):
        wrapper = build(cfg)
        check_trained(wrapper, peers)
        _check_adapters_trained(wrapper, distiller)
        return wrapper
    by_name = bool(cfg.get('paramwise_cfg') or cfg.get('constructor'))
    with _without(
        distiller, *(['methods', 'peers'] if by_name else ['peers'])
    ):
        wrapper = build(cfg)
    if isinstance(wrapper, OptimWrapperDict):
        # Such a student steps its optimisers itself, as its constructor says.
        return build(cfg)
    if by_name:
        for group in adapter_groups(distiller, cfg):
            wrapper.optimizer.add_param_group(group)
    if peers:
        adapters = distiller.methods.parameters()
        add_to_optimizer(wrapper, peers, cfg, adapters=adapters)
    return wrapper


def adapter_groups(
    distiller: Distiller, cfg: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the parameter groups of the methods' layers.

    They have the learning rate and the weight decay of the optimiser, and the
    settings for kinds of parameters (``norm_decay_mult``, ``bias_lr_mult``
    and so on). Of the ``custom_keys``, those count that begin with
    ``distillation``, or that are in the name of no parameter of the networks:
    a method that is called ``backbone_hint`` is no part of the backbone.

    Args:
        distiller: What is attached to the student.
        cfg: ``optim_wrapper`` of the config.
    """
    options: dict[str, Any] = copy.deepcopy({'optimizer': {}, **cfg})
    paramwise = dict(options.pop('paramwise_cfg', None) or {})
    constructor = options.pop('constructor', None)
    keys = paramwise.pop('custom_keys', None) or {}
    own = _keys_of_adapters(keys, distiller)
    if own:
        paramwise['custom_keys'] = own
    if not constructor:
        _warn_of_idle(keys, distiller)
    groups: list[dict[str, Any]] = []
    build = DefaultOptimWrapperConstructor(options, paramwise)
    build.add_params(groups, distiller.methods, prefix=f'{ATTACHED}.methods')
    return groups


def _keys_of_adapters(
    keys: Mapping[str, Any], distiller: Distiller
) -> dict[str, Any]:
    networks = _names_of_networks(distiller)
    return {
        key: value
        for key, value in keys.items()
        if key.startswith(ATTACHED)
        or not any(key in name for name in networks)
    }


def _warn_of_idle(keys: Iterable[str], distiller: Distiller) -> None:
    """Name the keys that MMEngine would ignore without a word."""
    networks = _names_of_networks(distiller)
    layers = _named(distiller.methods, f'{ATTACHED}.methods.')
    names = [*networks, *layers]
    for key in keys:
        if not any(key in name for name in names):
            print_log(
                f'{CUSTOM_KEYS}: "{key}" is in the name of no parameter and '
                'changes nothing',
                'current',
                logging.WARNING,
            )


def _names_of_networks(distiller: Distiller) -> list[str]:
    student = _named(distiller.student)
    names = [n for n in student if not n.startswith(f'{ATTACHED}.')]
    for peer in distiller.peers.values():
        names += _named(peer.model)
    return names


def _named(module: nn.Module, prefix: str = '') -> list[str]:
    return [f'{prefix}{name}' for name, _ in module.named_parameters()]


def _is_built(optimizer: Any) -> bool:
    return optimizer is not None and not isinstance(optimizer, Mapping)


def _check_adapters_trained(wrapper: Any, distiller: Distiller) -> None:
    """Refuse an optimiser that leaves out the methods' layers."""
    if not isinstance(wrapper, OptimWrapper):
        return
    trained = {
        id(p) for g in wrapper.optimizer.param_groups for p in g['params']
    }
    for name, method in distiller.methods.items():
        if any(id(p) not in trained for p in method.parameters()):
            raise ConfigError(
                'optim_wrapper is an optimiser that is already built, and it '
                f'does not train the layers of distillation.methods.{name}. '
                'Give its config: they are then added to it.'
            )


@contextmanager
def _without(distiller: Distiller, *names: str) -> Iterator[None]:
    """Hide parts of the distiller from those who ask for its parameters."""
    modules = distiller._modules
    kept = dict(modules)
    for name in names:
        del modules[name]
    try:
        yield
    finally:
        # All of them again, in their order.
        modules.clear()
        modules.update(kept)
