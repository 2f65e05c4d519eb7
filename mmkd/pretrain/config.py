"""The config of a pretraining, made of the configs of detectors."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from mmkd.errors import ConfigError

OPTIMIZERS: dict[str, dict[str, Any]] = {
    'lars': dict(type='mmkd.LARS', momentum=0.9, weight_decay=1e-4),
    'adamw': dict(type='AdamW', weight_decay=1e-4),
}
"""SimCLRv2's LARS, and what suits batches that are too small for it."""
RATES = {'lars': 0.3 / 256, 'adamw': 1e-3 / 256}
"""Learning rates for each image of a batch."""
DOGO_WEIGHTS = (100.0, 1.0)
"""Of the first network and the others, as in the official code's template."""
CHECKPOINTS = 10
"""About so many times a run saves one."""
LOGGED = 50
"""At most so many iterations lie between two lines of the log."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a pretraining is to be like.

    Attributes:
        epochs: Passes over the images.
        batch_size: Images of a step, in each process.
        optimizer: ``'lars'`` or ``'adamw'``.
        lr: The highest learning rate; None for one that suits the batch.
        weight_decay: None for that of the optimiser.
        warmup: Epochs in which the learning rate rises; None for a tenth.
        temperature: That of NT-Xent.
        kl_weights: For each network, that of the others' similarities; empty
            if every network learns alone.
        kl_temperature: That of the similarities.
        size: The sides of the crops, in pixels.
        scale: The least and the largest part of an image that is cut out.
        strength: Of the changes of colour.
        blur: The probability of a blur.
        projection: The length of a projection.
        interval: Epochs between two measurements.
        annotations: Labelled data whose objects measure progress.
        workers: Processes that load images.
        seed: Of all random numbers.
    """

    epochs: int = 100
    batch_size: int = 64
    optimizer: str = 'lars'
    lr: float | None = None
    weight_decay: float | None = None
    warmup: int | None = None
    temperature: float = 0.1
    kl_weights: Sequence[float] = ()
    kl_temperature: float = 0.1
    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    strength: float = 1.0
    blur: float = 0.5
    projection: int = 128
    interval: int = 10
    annotations: str | None = None
    workers: int = 2
    seed: int = 0


def network_name(source: str, taken: Mapping[str, Any]) -> str:
    """Name a network after the file of its config, unlike those taken."""
    stem = Path(source.rpartition('::')[2]).stem
    name = base = re.sub(r'\W', '_', stem)
    number = 2
    while name in taken:
        name = f'{base}_{number}'
        number += 1
    return name


def network_options(
    config: Config, source: str, *, scratch: bool
) -> dict[str, Any]:
    """Return what :class:`~mmkd.pretrain.model.Network` takes of a config.

    Args:
        config: The config of a detector.
        source: What it is called in messages.
        scratch: Leave out the weights that the backbone would begin with.

    Raises:
        ConfigError: If its model has no backbone.
    """
    model = config.model
    if not isinstance(model.get('backbone'), Mapping):
        inside = [
            key
            for key, part in model.items()
            if isinstance(part, Mapping) and 'backbone' in part
        ]
        hint = f' It has {inside[0]}.backbone: ' if inside else ' '
        raise ConfigError(
            f'{source}: expected a model with a `backbone`, got '
            f'{model.get("type")} with {", ".join(sorted(model))}.{hint}give '
            'the config of a detector itself.'
        )
    backbone = copy.deepcopy(model.backbone.to_dict())
    if scratch:
        backbone['init_cfg'] = None
        backbone.pop('pretrained', None)
    pixels = model.get('data_preprocessor') or {}
    # Images are loaded as BGR, and either of the two options reverses that.
    rgb = any(pixels.get(key) for key in ('bgr_to_rgb', 'rgb_to_bgr'))
    return dict(
        backbone=backbone,
        mean=list(pixels.get('mean') or ()),
        std=list(pixels.get('std') or ()),
        rgb=rgb,
    )


def pretraining_config(
    networks: Mapping[str, Mapping[str, Any]],
    list_file: Path,
    images: int,
    options: Options,
    imports: Sequence[str] = (),
) -> Config:
    """Return the config of a pretraining.

    Args:
        networks: For each name the options of a network.
        list_file: The file that names the images.
        images: How many there are.
        options: What the pretraining is to be like.
        imports: The modules that the networks' configs import.

    Raises:
        ConfigError: If there are fewer images than a batch has.
    """
    steps = images // options.batch_size
    if not steps:
        raise ConfigError(
            f'--batch-size {options.batch_size} is more than there are images '
            f'({images}): no batch would be full. Take a smaller one, or more '
            'images.'
        )
    content: dict[str, Any] = dict(
        default_scope='mmdet',
        runner_type='mmkd.DistillationRunner',
        model=_model(networks, options),
        train_dataloader=_loader(list_file, options),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=options.epochs),
        optim_wrapper=_optimizer(options),
        param_scheduler=_schedule(options, steps),
        default_hooks=_hooks(options, steps),
        custom_hooks=[
            dict(
                type='mmkd.RepresentationHook',
                interval=options.interval,
                annotations=options.annotations,
            ),
            dict(type='mmkd.ExportBackbonesHook'),
            dict(type='mmkd.ProgressHook', commands=False),
        ],
        randomness=dict(seed=options.seed),
        env_cfg=dict(
            cudnn_benchmark=True,
            mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
            dist_cfg=dict(backend='nccl'),
        ),
        log_processor=dict(type='LogProcessor', window_size=LOGGED),
        log_level='INFO',
        # Of some backbones, such as Swin, the last map needs only a part.
        find_unused_parameters=True,
        load_from=None,
        resume=False,
    )
    if torch.cuda.is_available():  # SimCLR's norms see the whole batch
        content['sync_bn'] = 'torch'
    if imports:
        content['custom_imports'] = dict(
            imports=list(imports), allow_failed_imports=False
        )
    return Config(content)


def _model(
    networks: Mapping[str, Mapping[str, Any]], options: Options
) -> dict[str, Any]:
    model = dict(
        type='mmkd.ContrastivePretraining',
        networks={name: dict(each) for name, each in networks.items()},
        size=options.size,
        temperature=options.temperature,
        strength=options.strength,
        blur=options.blur,
        projection=options.projection,
    )
    if options.kl_weights:
        model |= dict(
            kl_weights=list(options.kl_weights),
            kl_temperature=options.kl_temperature,
        )
    return model


def _loader(list_file: Path, options: Options) -> dict[str, Any]:
    return dict(
        batch_size=options.batch_size,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        drop_last=True,
        collate_fn=dict(type='default_collate'),
        sampler=dict(type='DefaultSampler', shuffle=True),
        dataset=dict(
            type='mmkd.RandomCrops',
            list_file=str(list_file),
            size=options.size,
            scale=list(options.scale),
        ),
    )


def _optimizer(options: Options) -> dict[str, Any]:
    optimizer = dict(OPTIMIZERS[options.optimizer])
    rate = RATES[options.optimizer] * options.batch_size
    optimizer['lr'] = rate if options.lr is None else options.lr
    if options.weight_decay is not None:
        optimizer['weight_decay'] = options.weight_decay
    return dict(type='OptimWrapper', optimizer=optimizer)


def _schedule(options: Options, steps: int) -> list[dict[str, Any]]:
    """A linear rise, and then half a cosine down to 0, step by step."""
    rise = options.warmup
    if rise is None:
        rise = min(10, options.epochs // 10)
    if not 0 <= rise < options.epochs:
        raise ConfigError(
            f'--warmup-epochs must be from 0 to below the {options.epochs} '
            f'epochs, got {rise}.'
        )
    fall = dict(
        type='CosineAnnealingLR',
        eta_min=0.0,
        T_max=options.epochs - rise,
        begin=rise,
        end=options.epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    )
    if not rise:
        return [fall]
    first = dict(
        type='LinearLR',
        start_factor=1 / (rise * steps + 1),
        begin=0,
        end=rise,
        by_epoch=True,
        convert_to_iter_based=True,
    )
    return [first, fall]


def _hooks(options: Options, steps: int) -> dict[str, Any]:
    return dict(
        timer=dict(type='IterTimerHook'),
        logger=dict(type='LoggerHook', interval=min(LOGGED, steps)),
        param_scheduler=dict(type='ParamSchedulerHook'),
        checkpoint=dict(
            type='CheckpointHook',
            interval=max(options.epochs // CHECKPOINTS, 1),
            max_keep_ckpts=1,
        ),
        sampler_seed=dict(type='DistSamplerSeedHook'),
    )
