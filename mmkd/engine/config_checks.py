"""What the runner would ignore of a config is refused, or said once."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from mmengine.device import get_device
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import LogProcessor

from mmkd.errors import ConfigError

from .hooks import SafeCheckpointHook
from .log_processor import TrainingLog

RUNNER_KEYS = (
    *('model', 'work_dir', 'load_from', 'resume', 'launcher', 'randomness'),
    *('train_dataloader', 'train_cfg', 'val_dataloader', 'val_cfg'),
    *('val_evaluator', 'test_dataloader', 'test_cfg', 'test_evaluator'),
    *('optim_wrapper', 'param_scheduler', 'auto_scale_lr', 'custom_hooks'),
    *('default_hooks', 'data_preprocessor', 'env_cfg', 'log_processor'),
    *('log_level', 'visualizer', 'default_scope', 'experiment_name'),
    *('model_wrapper_cfg', 'sync_bn', 'find_unused_parameters', 'compile'),
    *('activation_checkpointing', 'efficient_conv_bn_eval', 'runner_type'),
    *('distillation', 'custom_imports', 'trust_checkpoint'),
)
"""The keys of a config that MMEngine and mmkd read."""
FORMER_KEYS = dict(
    lr_config='param_scheduler',
    optimizer_config='optim_wrapper',
    checkpoint_config='default_hooks.checkpoint',
    log_config='default_hooks.logger',
    evaluation='val_evaluator and train_cfg.val_interval',
)
"""Keys of MMDetection 2, and what has taken their place."""
ALIKE = 0.88
"""Above this likeness a key is taken for a misspelt one. All variables of
MMDetection's own configs lie below it."""


def check_keys(cfg: Mapping[str, Any]) -> None:
    """Refuse a misspelt ``distillation``, and what another runner is for.

    Raises:
        ConfigError: If the config has one of them.
    """
    if cfg.get('strategy') is not None:
        raise ConfigError(
            'the config has a `strategy`, which DistillationRunner does not '
            'follow: it trains on one device, or on several by distributed '
            "data parallel (--launcher). Remove the key; MMEngine's "
            'FlexibleRunner (FSDP, DeepSpeed, ColossalAI) cannot distil.'
        )
    if 'distillation' in cfg:
        return
    names = {str(name).lower(): name for name in cfg}
    close = difflib.get_close_matches('distillation', names, n=1, cutoff=0.65)
    if close:
        raise ConfigError(
            f'the config has "{names[close[0]]}" where "distillation" is '
            'expected; rename it.'
        )


def check_mixed_precision(cfg: Mapping[str, Any]) -> None:
    """Refuse mixed precision where MMEngine has none: without a GPU.

    Raises:
        ConfigError: If an optimiser's wrapper asks for it.
    """
    wrapper = cfg.get('optim_wrapper') or {}
    kinds = [wrapper, *wrapper.values()]
    amp = any(
        'AmpOptimWrapper' in str(each.get('type'))
        for each in kinds
        if isinstance(each, dict)
    )
    if not amp or get_device() != 'cpu':
        return
    extra = [key for key in ('loss_scale', 'dtype') if key in wrapper]
    raise ConfigError(
        "optim_wrapper.type='AmpOptimWrapper' (--amp) trains in mixed "
        'precision, which MMEngine does on GPUs alone, and none is found '
        "here. Leave out --amp, or set optim_wrapper.type='OptimWrapper'"
        + f' and remove {" and ".join(extra)} beside it' * bool(extra)
        + '.'
    )


def remarks(
    cfg: Mapping[str, Any], hooks: Iterable[Hook], log: LogProcessor
) -> list[str]:
    """Return what a training has to be told about its config.

    Args:
        cfg: The config.
        hooks: The hooks that are registered.
        log: What writes the lines of the log.
    """
    found = []
    for key in cfg:
        if key in RUNNER_KEYS:
            continue
        close = difflib.get_close_matches(key, RUNNER_KEYS, 1, cutoff=ALIKE)
        if close or key in FORMER_KEYS:
            meant = close[0] if close else FORMER_KEYS[key]
            found.append(
                f'Nothing reads the key `{key}` of the config; did you mean '
                f'{meant}?'
            )
    savers = [hook for hook in hooks if isinstance(hook, CheckpointHook)]
    if not savers:
        found.append(
            'This run saves no checkpoints, and cannot be resumed: '
            'default_hooks.checkpoint is None'
        )
    found += [
        f'{type(hook).__name__} saves the checkpoints. It may remove an old '
        'one before the new one is complete, unless it is derived from '
        'mmkd.SafeCheckpointHook'
        for hook in savers
        if not isinstance(hook, SafeCheckpointHook)
    ]
    if not isinstance(log, TrainingLog):
        found.append(
            f'{type(log).__name__} writes the log. It may repeat the last '
            'loss of a method that has stopped, unless it is derived from '
            'mmkd.engine.log_processor.TrainingLog'
        )
    return found
