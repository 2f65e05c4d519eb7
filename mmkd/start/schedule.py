"""The length of a training, and the learning rate of its batch."""

import math
import re
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config

from mmkd.errors import ConfigError

from .text import plain

SHORT = 4000
"""Iterations with which a detector on ImageNet weights learns little."""
OF_HOOKS = ('num_last_epochs', 'switch_epoch')
"""Options of hooks that count epochs."""


def schedule_entries(
    base: Config,
    name: str,
    *,
    epochs: int | None = None,
    batch_size: int | None = None,
    images: int | None = None,
    own_data: bool = False,
    trained: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Fit a student's schedule.

    Args:
        base: The student's config, with its data.
        name: The name of its file.
        epochs: The length; the student's own by default.
        batch_size: The images of a batch on each GPU; likewise.
        images: The number of images to train on, if it is known.
        own_data: Whether the schedule was made for other data.
        trained: Whether the student begins with weights of a detector.

    Returns:
        The entries that change, and a line for each choice.

    Raises:
        ConfigError: If ``epochs`` is given for a training by iterations.
    """
    whole = plain(base)
    entries, why = _of_length(whole, epochs) if epochs else ({}, [])
    loader = whole['train_dataloader']
    batch = batch_size or loader.get('batch_size') or 1
    if batch_size:
        entries['train_dataloader'] = dict(batch_size=batch_size)
    if batch_size or own_data:
        changed, line = _of_batch(whole, batch, name)
        entries |= changed
        why += line if batch_size or changed else []
    length = epochs or (whole.get('train_cfg') or {}).get('max_epochs')
    if images and length:
        times = _times(loader['dataset'])
        total = length * math.ceil(images * times / batch)
        entries |= _short_warm_up(whole | entries, total, why)
        if own_data and total < SHORT and not trained:
            why.append(
                f'length: {total:,} iterations of {batch} images, which is '
                'short for weights of ImageNet. --epochs N makes it longer, '
                'and --load-from FILE begins with the weights of a detector'
            )
    return entries, why


def _times(dataset: Mapping[str, Any]) -> int:
    """How often an epoch shows each image."""
    times = 1
    while dataset.get('dataset'):
        times *= dataset.get('times', 1)
        dataset = dataset['dataset']
    return times


def _of_batch(
    whole: Mapping[str, Any], batch: int, name: str
) -> tuple[dict[str, Any], list[str]]:
    """Scale the learning rate by the batch that it was made for."""
    own = whole['train_dataloader'].get('batch_size') or 1
    made_for = (whole.get('auto_scale_lr') or {}).get('base_batch_size') or 0
    scaled: dict[str, Any] = dict(enable=True)
    named = re.search(r'_(\d+)xb(\d+)', name)  # GPUs and the batch of each
    if made_for < own and named:  # as RTMDet's, which it takes from its base
        made_for = int(named[1]) * int(named[2])
        scaled['base_batch_size'] = made_for
    if made_for < own:
        return {}, [
            'learning rate: as it is, because the student does not say for '
            'which batch it was made (auto_scale_lr.base_batch_size)'
        ]
    return dict(auto_scale_lr=scaled), [
        f'learning rate: times {batch / made_for:.3g} on one GPU '
        f'(auto_scale_lr), for batches of {batch} instead of {made_for}'
    ]


def _of_length(
    whole: Mapping[str, Any], epochs: int
) -> tuple[dict[str, Any], list[str]]:
    """Stretch all that is counted in epochs."""
    loop = whole.get('train_cfg') or {}
    former = loop.get('max_epochs')
    if not former:
        raise ConfigError(
            '--epochs is for students that train by epochs; this one trains '
            f'for {loop.get("max_iters")} iterations. Give --cfg-options '
            'train_cfg.max_iters=N, and fit param_scheduler in the config.'
        )

    def to(value: Any) -> Any:
        return max(1, round(value * epochs / former)) if value > 0 else value

    entries: dict[str, Any] = dict(train_cfg=dict(max_epochs=epochs))
    for key in ('val_interval', 'val_begin'):
        if to(loop.get(key) or 0) < (loop.get(key) or 0):
            entries['train_cfg'][key] = to(loop[key])
    if steps := loop.get('dynamic_intervals'):
        entries['train_cfg']['dynamic_intervals'] = [
            (to(begin), min(interval, epochs)) for begin, interval in steps
        ]
    schedulers = whole.get('param_scheduler')
    if isinstance(schedulers, list):
        new = [_stretched(each, to) for each in schedulers]
        entries['param_scheduler'] = [
            s for s in new if s.get('end', math.inf) > s.get('begin', 0)
        ]
    elif schedulers:
        entries['param_scheduler'] = _stretched(schedulers, to)
    saver = (whole.get('default_hooks') or {}).get('checkpoint') or {}
    if saver.get('by_epoch', True) and saver.get('interval', 1) > 1:
        interval = min(saver['interval'], to(saver['interval']))
        entries['default_hooks'] = dict(checkpoint=dict(interval=interval))
    hooks = whole.get('custom_hooks') or []
    new = [
        {**h, **{key: to(h[key]) for key in OF_HOOKS if h.get(key)}}
        for h in hooks
    ]
    if new != hooks:
        entries['custom_hooks'] = new
    return entries, [
        f'epochs: {epochs} instead of {former}, with all that counts them '
        '(param_scheduler, intervals, hooks) in proportion'
    ]


def _stretched(scheduler: Mapping[str, Any], to: Any) -> dict[str, Any]:
    new = dict(scheduler)
    if not scheduler.get('by_epoch', True):
        return new
    for key in ('begin', 'end', 'T_max', 'step_size', 'total_iters'):
        if isinstance(new.get(key), int | float):
            new[key] = to(new[key])
    if 'milestones' in new:
        new['milestones'] = sorted({to(m) for m in new['milestones']})
    return new


def _short_warm_up(
    whole: Mapping[str, Any], total: int, why: list[str]
) -> dict[str, Any]:
    """Let no warm-up by iterations take more than a third of a training."""
    schedulers = whole.get('param_scheduler')
    if not isinstance(schedulers, list):
        return {}
    longest = max(1, total // 3)
    new = []
    for each in schedulers:
        warm_up = (
            not each.get('by_epoch', True) and each.get('begin', 0) == 0
        ) and each.get('end', 0) > longest
        if warm_up:
            why.append(
                f'warm-up: {longest} iterations instead of {each["end"]}, a '
                f'third of the {total:,} of the training'
            )
        new.append({**each, 'end': longest} if warm_up else each)
    return {} if new == schedulers else dict(param_scheduler=new)
