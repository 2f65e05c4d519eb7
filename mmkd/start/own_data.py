"""The entries of a config with which a stock student reads other data.

The pipelines stay the student's, wherever they are, and so do the data sets
that wrap the innermost one: a mosaic is made of the new images.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmkd.data import read_json
from mmkd.data.layouts import Data
from mmkd.errors import ConfigError

from .text import Raw, plain

KEYS = {'CocoMetric': 'coco', 'VOCMetric': 'pascal_voc'}
"""What metrics put in front of their values."""


def data_entries(base: Config, data: Data) -> tuple[dict[str, Any], list[str]]:
    """Replace a student's data.

    Args:
        base: The student's config.
        data: The data.

    Returns:
        The entries that change, and a line for each choice.

    Raises:
        ConfigError: If the student cannot be trained on such data.
    """
    _check_annotations(base, data)
    entries: dict[str, Any] = dict(classes=data.classes)
    if model := _with_classes(base.model.to_dict(), len(data.classes)):
        entries['model'] = model
    for key, loop in (('val_cfg', 'ValLoop'), ('test_cfg', 'TestLoop')):
        if not base.get(key):
            entries[key] = dict(type=loop)
    test = data.test
    entries['train_dataloader'], why = _loader(base, 'train', data.train)
    entries['val_dataloader'], _ = _loader(base, 'val', data.val)
    entries['test_dataloader'] = Raw('val_dataloader')
    entries['val_evaluator'] = dict(_delete_=True, **data.metric)
    entries['test_evaluator'] = Raw('val_evaluator')
    if test:
        entries['test_dataloader'], _ = _loader(base, 'test', test)
        metric = dict(_delete_=True, **data.metric)
        if 'ann_file' in metric:
            path = Path(test.get('data_root', ''), test['ann_file'])
            metric['ann_file'] = str(path)
        entries['test_evaluator'] = metric
    changed, lines = _monitors(base, data.metric)
    return entries | changed, why + lines


# --------------------------------------------------------------------- loaders


def _loader(
    base: Config, split: str, data: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The entry of a loader, and which wrappers it keeps."""
    name = f'{split}_dataloader'
    others = ('test_dataloader', 'val_dataloader')
    places = [name, *(o for o in others if split != 'train')]
    place = next((p for p in places if base.get(p)), None)
    if place is None:
        raise ConfigError(
            f'the student has no {name}, whose pipeline the data would be '
            'read with. Write it into a config with your data and give that '
            'as --student, without --data.'
        )
    whole = base[place].dataset
    path, leaf, kept = _innermost(whole, f'_base_.{place}.dataset')
    dataset = dict(_delete_=True, **data)
    if split != 'train':
        dataset['test_mode'] = True
    else:
        dataset['filter_cfg'] = dict(filter_empty_gt=True, min_size=1)
        if dataset['type'] == 'VOCDataset':
            dataset['filter_cfg']['bbox_min_size'] = 1
    dataset['metainfo'] = dict(classes=Raw('classes'))
    if 'pipeline' in leaf:
        steps = plain(leaf)['pipeline']
        named = 'train_pipeline' if split == 'train' else 'test_pipeline'
        if plain(base).get(named) == steps:
            dataset['pipeline'] = Raw(f'{{{{_base_.{named}}}}}')
        elif '[' in path:  # which cannot be referred to
            dataset['pipeline'] = steps
        else:
            dataset['pipeline'] = Raw(f'{{{{{path}.pipeline}}}}')
    for _ in kept:
        dataset = dict(dataset=dataset)
    entry: dict[str, Any] = dict(dataset=dataset)
    if place != name:
        entry = base[place].to_dict() | entry
    why = []
    if kept:
        shown = ', '.join(
            f'{w.type} (times={w.times})' if 'times' in w else str(w.type)
            for w in kept
        )
        why = [f"{name}: the images go through the student's {shown}"]
    return entry, why if split == 'train' else []


def _innermost(dataset: Any, path: str) -> tuple[str, Any, list[Any]]:
    """Find the data set that reads files.

    Returns:
        Its path in the config, its config, and the wrappers that are kept.
        Several data sets that are joined become one, with the pipeline of
        the first.
    """
    kept = []
    joined = False
    while True:
        if dataset.get('dataset') is not None:
            if not joined:
                kept.append(dataset)
            dataset, path = dataset.dataset, f'{path}.dataset'
        elif dataset.get('datasets'):
            dataset, path = dataset.datasets[0], f'{path}.datasets[0]'
            joined = True
        else:
            return path, dataset, kept


# ----------------------------------------------------------------------- model


def _with_classes(model: Any, count: int) -> Any:
    """What of a model's config changes with the number of classes.

    Lists are whole, because a config replaces them.
    """
    if isinstance(model, list | tuple):
        changed = [_with_classes(each, count) for each in model]
        if not any(changed):
            return None
        return [_merged(a, b) for a, b in zip(model, changed, strict=True)]
    if not isinstance(model, Mapping):
        return None
    entries = {}
    for key, value in model.items():
        if key == 'num_classes' and value != count:
            entries[key] = count
        elif found := _with_classes(value, count):
            entries[key] = found
    return entries


def _merged(value: Any, changes: Any) -> Any:
    if not isinstance(value, Mapping):
        return copy.deepcopy(changes or value)
    result = copy.deepcopy(dict(value))
    for key, change in (changes or {}).items():
        result[key] = _merged(value[key], change)
    return result


def _check_annotations(base: Config, data: Data) -> None:
    """Refuse a student that trains on what the data have not."""
    needs = _needs(base.to_dict().get('train_dataloader'))
    if needs['with_seg']:
        what, remedy = 'a semantic map of each image', ''
    elif needs['proposals']:
        what, remedy = 'proposals that another network has computed', ''
    elif needs['with_mask'] and not _has_masks(data):
        what = 'masks of the objects'
        remedy = ' (Faster R-CNN instead of Mask R-CNN, say)'
    else:
        return
    raise ConfigError(
        f'the student, {base.model.type}, trains on {what}, and the data '
        f'have boxes alone. Take a student that trains on boxes{remedy}.'
    )


def _needs(value: Any) -> dict[str, bool]:
    """What the transforms anywhere in a loader read besides boxes."""
    found = dict.fromkeys(('with_seg', 'with_mask', 'proposals'), False)
    if isinstance(value, Mapping):
        for key in ('with_seg', 'with_mask'):
            found[key] = bool(value.get(key))
        kind = str(value.get('type')).rpartition('.')[2]
        found['with_seg'] |= kind == 'LoadPanopticAnnotations'
        found['proposals'] = kind == 'LoadProposals'
        parts = list(value.values())
    else:
        parts = list(value) if isinstance(value, list | tuple) else []
    for part in parts:
        for key, needed in _needs(part).items():
            found[key] |= needed
    return found


def _has_masks(data: Data) -> bool:
    if data.train['type'] != 'CocoDataset':
        return False
    path = Path(data.train.get('data_root', ''), data.train['ann_file'])
    objects = read_json(path)['annotations']
    return bool(objects) and all(o.get('segmentation') for o in objects)


# ---------------------------------------------------------------------- metric


def metric_names(metric: Mapping[str, Any]) -> list[str]:
    """Return the values that a metric gives, the main one first.

    Args:
        metric: The metric's config; nothing is known of other kinds than
            COCO's and VOC's.
    """
    kind = str(metric['type']).rpartition('.')[2]
    if kind not in KEYS:
        return []
    prefix = metric.get('prefix') or KEYS[kind]
    names = ['mAP', 'AP50']
    if kind == 'CocoMetric':
        of = metric.get('metric', 'bbox')
        of = [of] if isinstance(of, str) else of
        parts = ('', '_50', '_75', '_s', '_m', '_l')
        names = [f'{each}_mAP{part}' for each in of for part in parts]
    return [f'{prefix}/{name}' for name in names]


def _fitting(name: Any, known: Sequence[str]) -> Any:
    """Return the value of a metric that stands for another metric's."""
    if isinstance(name, list | tuple):
        return list(dict.fromkeys(_fitting(each, known) for each in name))
    if not isinstance(name, str) or name == 'auto' or name in known:
        return name
    if name == 'loss' or name.endswith(('/loss', '_loss')):
        return name
    at_50 = [k for k in known if k.endswith(('_50', 'AP50'))]
    return at_50[0] if name.endswith('50') and at_50 else known[0]


KEPT = 3
"""Checkpoints that are kept beside the best, where a student says nothing."""
MONITORS = ('save_best', 'monitor', 'key_indicator')
"""Options of hooks and schedules that name a value of the metric."""


def _monitors(
    base: Config, metric: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """What hooks and schedules watch, as the metric of the data names it."""
    known = metric_names(metric)
    entries: dict[str, Any] = {}
    why: list[str] = []
    if not known:
        return entries, why

    def changes(part: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for option in MONITORS:
            new = _fitting(part.get(option), known)
            if part.get(option) and new != part[option]:
                found[option] = new
                kind = str(part.get('type')).rpartition('.')[2]
                why.append(
                    f'{kind}.{option}: {_shown(new)}, the value of the '
                    f'metric of these data, in place of '
                    f'{_shown(part[option])}'
                )
        return found

    whole = plain(base)
    for name, hook in (whole.get('default_hooks') or {}).items():
        if found := changes(hook or {}):
            entries.setdefault('default_hooks', {})[name] = found
    saver = (whole.get('default_hooks') or {}).get('checkpoint')
    if saver and not saver.get('save_best'):
        entries.setdefault('default_hooks', {})['checkpoint'] = dict(
            save_best=known[0],
            max_keep_ckpts=saver.get('max_keep_ckpts', KEPT),
        )
        why.append(
            f'checkpoints: the last {saver.get("max_keep_ckpts", KEPT)}, and '
            f'the best by {known[0]}'
        )
    for key in ('custom_hooks', 'param_scheduler'):
        parts = whole.get(key) or []
        if isinstance(parts, Mapping):
            if found := changes(parts):
                entries[key] = found
            continue
        new = [
            {**p, **changes(p)} if isinstance(p, Mapping) else p for p in parts
        ]
        if new != parts:
            entries[key] = new
    return entries, why


def check_monitors(cfg: Mapping[str, Any]) -> None:
    """Check that hooks watch what the metric gives.

    Raises:
        ConfigError: If one names another value; training would end after the
            first validation.
    """
    evaluators = cfg.get('val_evaluator') or []
    if isinstance(evaluators, Mapping):
        evaluators = [evaluators]
    known = [name for metric in evaluators for name in metric_names(metric)]
    if not known or not all(metric_names(metric) for metric in evaluators):
        return
    hooks = [
        *(cfg.get('default_hooks') or {}).values(),
        *(cfg.get('custom_hooks') or []),
    ]
    for hook in hooks:
        kind = str((hook or {}).get('type')).rpartition('.')[2]
        options = {
            'CheckpointHook': 'save_best',
            'EarlyStoppingHook': 'monitor',
        }
        given = (hook or {}).get(options.get(kind, ''))
        for name in given if isinstance(given, list | tuple) else [given]:
            if name and name != 'auto' and name not in known:
                raise ConfigError(
                    f'{kind}.{options[kind]} is {name}, which the metric of '
                    f'the data does not give. It gives {", ".join(known)}.'
                )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else ', '.join(value)
