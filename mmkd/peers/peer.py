"""Networks that train beside the student, in the same step."""

import copy
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from mmkd.data.batch import Batch
from mmkd.data.files import replacing, write_text
from mmkd.detectors.source import (
    build_trained,
    check_class_count,
    class_names,
    find_in_model_index,
    load_config,
)
from mmkd.detectors.wrappers import check_is_detector
from mmkd.errors import ConfigError
from mmkd.teachers.renormalize import Renormalize, check_channels
from mmkd.utils import ATTACHED, check_options, isolated_random_state

PEER_OPTIONS = (
    'name',
    'config',
    'checkpoint',
    'cfg_options',
    'optim_wrapper',
    'trust_checkpoint',
    'prefix',
)

TRAINED_TEACHER = 'teacher'
"""The name of the peer that is ``teacher=dict(..., trainable=True)``."""


class Peer(nn.Module):
    """A detector that trains on the student's batches by its own loss.

    It sees the batch in its own normalisation, and draws its random numbers
    (samplers, dropout) from a stream of its own. The student's random numbers
    are therefore those of training alone.

    Args:
        model: The stock detector.
        config: Its config.
        student: The student, for the normalisation.
        optim_wrapper: The peer's own optimiser settings. None takes those of
            the student.
        seed: The seed of its stream of random numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        student: Any,
        optim_wrapper: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.config, self.optim_wrapper = config, optim_wrapper
        self.seed = seed
        self.renormalize = Renormalize(
            student.data_preprocessor, model.data_preprocessor
        )

    def loss(self, batch: Batch) -> dict[str, Tensor | list[Tensor]]:
        """Return the peer's stock losses of the student's batch."""
        # The step is in the seed, so that a resumed run continues the stream.
        stream = np.random.SeedSequence((self.seed, get_rank(), batch.step))
        with isolated_random_state(int(stream.generate_state(1)[0])):
            return self.model.loss(
                self.renormalize(batch.inputs, batch.data_samples),
                batch.copies(),
            )


def with_trained_teacher(cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    """Move a teacher that trains in the same step to the peers.

    ``distillation.teacher=dict(..., trainable=True)`` has the options of a
    peer and becomes one: the last, with the name ``teacher``.

    Args:
        cfg: ``distillation`` of a config, which is not changed.

    Returns:
        The same config without the option ``trainable``.
    """
    teacher = cfg.get('teacher')
    if not isinstance(teacher, Mapping) or 'trainable' not in teacher:
        return cfg
    options = {k: v for k, v in teacher.items() if k != 'trainable'}
    if not teacher['trainable']:
        return {**cfg, 'teacher': options}
    others = {k: v for k, v in cfg.items() if k != 'teacher'}
    peers = {**(cfg.get('peers') or {}), TRAINED_TEACHER: options}
    return {**others, 'peers': peers}


def place_of(name: str) -> str:
    """Return where in a config a peer is described."""
    part = 'teacher' if name == TRAINED_TEACHER else f'peers.{name}'
    return f'distillation.{part}'


def build_peer(
    name: str,
    cfg: Mapping[str, Any],
    *,
    student: nn.Module,
    classes: Sequence[str],
    named: bool = True,
    seed: int,
) -> Peer:
    """Build a network that trains beside the student.

    Args:
        name: The key in ``distillation.peers``; ``'teacher'`` for a teacher
            with ``trainable=True``.
        cfg: A dict with ``config`` (a path, ``mmdet::…``, a config dict), or
            with the ``name`` of a model in MMDetection's index, whose config
            and weights are taken. With ``checkpoint`` it starts from a file,
            and without from the initialisation of its config; ``prefix`` is
            what comes before its names in that file.
            ``cfg_options`` overrides entries of the config, and
            ``optim_wrapper`` has optimiser settings of its own for the
            student's kind of optimiser.
        student: The student's detector.
        classes: The class names of the training data.
        named: Whether the data name them; if not, they are numbers.
        seed: The seed of its weights and its random numbers.

    Raises:
        ConfigError: If the description is incomplete or does not fit.
        CheckpointError: If the checkpoint does not fit the config exactly.
    """
    where = place_of(name)
    if name == 'student':
        raise ConfigError(
            f'{where}: "student" is the name of the model itself in losses. '
            'Choose another one.'
        )
    options = dict(cfg)
    check_options(where, options, PEER_OPTIONS)
    if 'name' in options:
        options = {**find_in_model_index(options.pop('name')), **options}
    if 'config' not in options:
        raise ConfigError(
            f'{where} needs a "config" (a path, "mmdet::…" or a dict), got '
            f'{sorted(options)}.'
        )
    config = load_config(options['config'])
    config.merge_from_dict(dict(options.get('cfg_options') or {}))
    with isolated_random_state(seed):
        if options.get('checkpoint'):
            trust = bool(options.get('trust_checkpoint', False))
            model, _ = build_trained(
                config.model,
                options['checkpoint'],
                trust=trust,
                prefix=options.get('prefix'),
            )
        else:
            register_all_modules(init_default_scope=False)
            with DefaultScope.overwrite_default_scope('mmdet'):
                model = MODELS.build(config.model)
            model.init_weights()
    check_is_detector(model, f'peer "{name}"')
    check_class_count(model, classes, where)
    check_channels(student, model, where)
    if named:
        _check_class_names(config, classes, where)
    return Peer(
        model.train(),
        config,
        student=student,
        optim_wrapper=options.get('optim_wrapper'),
        seed=seed,
    )


def _check_class_names(
    config: Config, classes: Sequence[str], where: str
) -> None:
    """Refuse a config that names other classes, but as many."""
    names = class_names({}, config)
    if names and len(names) == len(classes) and names != tuple(classes):
        raise ConfigError(
            f'{where}: its config names the classes {", ".join(names)}, but '
            f'it trains on {", ".join(classes)}, in this order. Set '
            'metainfo=dict(classes=...) of its data sets to these.'
        )


def add_to_optimizer(
    wrapper: OptimWrapper,
    peers: Mapping[str, Peer],
    student_cfg: Mapping[str, Any],
    adapters: Iterable[Tensor] = (),
) -> None:
    """Let the student's optimiser train the peers, each with its settings.

    The gradient of each network is clipped by its own norm, as in training
    alone, and so is that of the methods' own layers.

    Args:
        wrapper: The student's wrapper, built without the peers.
        peers: The networks to add.
        student_cfg: The student's ``optim_wrapper``, for peers without one.
        adapters: The methods' own parameters.

    Raises:
        ConfigError: If a peer has another kind of optimiser or wrapper,
            accumulates over another number of steps, or clips gradients
            although the student does not.
    """
    trained = [p for g in wrapper.optimizer.param_groups for p in g['params']]
    apart = {id(parameter) for parameter in adapters}
    own = [p for p in trained if id(p) not in apart]
    layers = [p for p in trained if id(p) in apart]
    networks = [_Clipped(own, wrapper), _Clipped(layers, wrapper)]
    for name, peer in peers.items():
        cfg = copy.deepcopy(dict(peer.optim_wrapper or student_cfg))
        theirs = build_optim_wrapper(peer.model, cfg)
        _check_same_steps(wrapper, theirs, name)
        for group in theirs.optimizer.param_groups:
            wrapper.optimizer.add_param_group(group)
        parameters = [
            p for g in theirs.optimizer.param_groups for p in g['params']
        ]
        networks.append(_Clipped(parameters, theirs))
    if wrapper.clip_grad_kwargs:
        wrapper._clip_grad = types.MethodType(_ClipEach(networks), wrapper)


def check_trained(wrapper: OptimWrapper, peers: Mapping[str, Peer]) -> None:
    """Refuse an optimiser that was built elsewhere, without the peers.

    Raises:
        ConfigError: If it leaves out a peer; the message names the first.
    """
    trained = {
        id(p) for g in wrapper.optimizer.param_groups for p in g['params']
    }
    for name, peer in peers.items():
        if not any(id(p) in trained for p in peer.parameters()):
            raise ConfigError(
                'optim_wrapper is an optimiser that is already built, and '
                f'it does not train {place_of(name)}. Give its config: the '
                'peers are then added to it.'
            )


def _check_same_steps(
    student: OptimWrapper, peer: OptimWrapper, name: str
) -> None:
    """Refuse what one optimiser for all networks cannot do."""
    where = f'{place_of(name)}.optim_wrapper'
    for what, ours, theirs in (
        ('optimiser is', *map(_optimizer, (student, peer))),
        ('wrapper is', type(student).__name__, type(peer).__name__),
        (
            'accumulative_counts are',
            student._accumulative_counts,
            peer._accumulative_counts,
        ),
    ):
        if ours != theirs:
            raise ConfigError(
                f"{where}: the {what} {theirs}, the student's {ours}. All "
                'networks take their steps together: give both the same.'
            )
    if peer.clip_grad_kwargs and not student.clip_grad_kwargs:
        raise ConfigError(
            f'{where} has clip_grad, the student has none. Give the '
            "student's optim_wrapper a clip_grad=dict(max_norm=...) as well; "
            'a large norm clips nothing.'
        )


def _optimizer(wrapper: OptimWrapper) -> str:
    return type(wrapper.optimizer).__name__


class _Clipped:
    """The weights of a network, and how their gradient is clipped."""

    def __init__(
        self, parameters: Sequence[Tensor], wrapper: OptimWrapper
    ) -> None:
        self.parameters, self.options = parameters, wrapper.clip_grad_kwargs
        self.clip = wrapper.clip_func if self.options else None


class _ClipEach:
    """Clips the gradient of each network by itself."""

    def __init__(self, networks: Sequence[_Clipped]) -> None:
        self.networks = networks

    def __call__(self, wrapper: OptimWrapper) -> None:
        for index, each in enumerate(self.networks):
            gradients = [p for p in each.parameters if p.grad is not None]
            if each.clip is None or not gradients:
                continue
            norm = each.clip(gradients, **each.options)
            if index == 0 and isinstance(norm, torch.Tensor):
                wrapper.message_hub.update_scalar(
                    'train/grad_norm', float(norm)
                )


def save_peers(
    folder: str,
    filename: str,
    peers: Mapping[str, Peer],
    saved: Mapping[str, Any],
) -> None:
    """Write each peer's stock checkpoint into a folder of its name.

    Its config lies beside it, for ``mmkd test <peer>/config.py
    <peer>/<filename>``.

    Args:
        folder: The folder of the student's checkpoint.
        filename: The name of the student's checkpoint.
        peers: The peers by name.
        saved: The student's checkpoint after it was split.
    """
    states = saved[ATTACHED]['state_dict']
    for name, peer in peers.items():
        prefix = f'{ATTACHED}.peers.{name}.model.'
        config = peer.config.pretty_text
        content = {
            'meta': {**saved['meta'], 'cfg': config},
            'state_dict': {
                key.removeprefix(prefix): value
                for key, value in states.items()
                if key.startswith(prefix)
            },
        }
        own = Path(folder, name)
        own.mkdir(parents=True, exist_ok=True)
        write_text(own / 'config.py', config)
        with replacing(own / filename) as file:
            torch.save(content, file)
