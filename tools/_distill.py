"""The config that `tools/distill.py` writes: a delta on the stock student."""

import copy
import os.path as osp
import pprint
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmkd.data import read_json, read_voc_xml
from mmkd.methods import Method
from mmkd.registry import METHODS
from mmkd.teacher_source import find_in_model_index, load_config
from mmkd.utils import ConfigError, nearest

FOLDERS = {'coco': 'data/coco', 'voc': 'data/VOCdevkit/VOC2007'}
"""Where tools/prepare_data.py leaves what it makes."""
SHORT = {
    'CoLearningAssignment': 'colad',
    'FasterRCNNDistillation': 'frcnn',
    'FeatureHint': 'hint',
    'LabelAssignmentDistillation': 'lad',
    'MutualLearning': 'dml',
    'OneTeacherSeveralStudents': 'one_teacher',
    'SoftLabelDistillation': 'soft_label',
}
VOC_SPLITS = (('train', 'val'), ('trainval', 'test'), ('train', 'test'))


@dataclass
class Data:
    """Training and validation data: the entries of two data sets' configs."""

    classes: tuple[str, ...]
    train: dict[str, Any]
    val: dict[str, Any]
    metric: dict[str, Any]


def methods() -> dict[str, type[Method]]:
    """Every registered method by a short name in lower case."""
    METHODS.import_from_location()
    return {
        SHORT.get(name, name.lower()): cls
        for name, cls in sorted(METHODS.module_dict.items())
        if cls.__module__.startswith('mmkd.')
    }


def find_method(name: str) -> str:
    """The config's ``type`` of a method's short name.

    Raises:
        ConfigError: If there is none; says the nearest.
    """
    known = methods()
    if name not in known:
        raise ConfigError(f'no method "{name}". {nearest(name, known)}')
    if known[name].needs != 'teacher':
        raise ConfigError(
            f'{name} ties networks that train together (`peers`), and has no '
            'teacher: see the configs of it.'
        )
    return f'mmkd.{known[name].__name__}'


def teacher_options(name: str, checkpoint: str | None) -> dict[str, str]:
    """``distillation.teacher`` of a name in the model index or a config.

    Raises:
        ConfigError: If the name is unknown, or a config has no checkpoint.
    """
    if checkpoint is not None and '://' not in checkpoint:
        checkpoint = osp.abspath(checkpoint)
    if '::' not in name and not name.endswith('.py'):
        find_in_model_index(name)
        options = {'name': name}
    elif checkpoint is None:
        raise ConfigError(
            f'the teacher {name} is a config: give its weights, too, with '
            '--teacher-checkpoint.'
        )
    else:
        options = {'config': name if '::' in name else osp.abspath(name)}
    return options | ({'checkpoint': checkpoint} if checkpoint else {})


# ---------------------------------------------------------------------- data


def find_data(name: str) -> Data:
    """The data of ``coco``, ``voc`` or a folder in one of these layouts.

    COCO's layout: ``annotations/*train*.json`` and ``*val*.json``, and
    folders of images that the files are named after
    (``instances_train2017.json``, ``train2017``). VOC's: ``Annotations``,
    ``JPEGImages`` and ``ImageSets/Main``, there or one folder below.

    Raises:
        ConfigError: If the folder is none of them.
    """
    root = Path(FOLDERS.get(name, name)).absolute()
    for folder in (root, *sorted(p for p in root.glob('*') if p.is_dir())):
        if (folder / 'ImageSets' / 'Main').is_dir():
            return _voc(folder)
    if (root / 'annotations').is_dir():
        return _coco(root)
    remedy = (
        f'Run `python tools/prepare_data.py {name}`.'
        if name in FOLDERS
        else 'Expected annotations/*.json (COCO) or ImageSets/Main (VOC).'
    )
    raise ConfigError(f'{root} holds no data in a known layout. {remedy}')


def _coco(root: Path) -> Data:
    found = {}
    for split in ('train', 'val'):
        files = sorted((root / 'annotations').glob(f'*{split}*.json'))
        files = [f for f in files if 'instances' in f.name] or files
        if not files:
            raise ConfigError(
                f'{root}/annotations has no file of the split "{split}" '
                f'(*{split}*.json).'
            )
        names = (files[0].stem.removeprefix('instances_'), split, 'images')
        images = next((n for n in names if (root / n).is_dir()), '')
        found[split] = dict(
            type='CocoDataset',
            data_root=f'{root}/',
            ann_file=f'annotations/{files[0].name}',
            data_prefix=dict(img=f'{images}/' if images else ''),
        )
    content = read_json(root / found['train']['ann_file'])
    rows = sorted(content['categories'], key=lambda row: row['id'])
    annotations = str(root / found['val']['ann_file'])
    return Data(
        tuple(row['name'] for row in rows),
        found['train'],
        found['val'],
        dict(type='CocoMetric', metric='bbox', ann_file=annotations),
    )


def _voc(folder: Path) -> Data:
    lists = folder / 'ImageSets' / 'Main'
    for splits in VOC_SPLITS:
        if all((lists / f'{split}.txt').is_file() for split in splits):
            break
    else:
        raise ConfigError(
            f'{lists} has neither train.txt and val.txt, nor trainval.txt '
            'and test.txt.'
        )
    root = folder.parent
    train, val = (
        dict(
            type='VOCDataset',
            data_root=f'{root}/',
            ann_file=f'{folder.name}/ImageSets/Main/{split}.txt',
            data_prefix=dict(sub_data_root=f'{folder.name}/'),
        )
        for split in splits
    )
    names: dict[str, None] = {}
    for line in (lists / f'{splits[0]}.txt').read_text().split():
        path = folder / 'Annotations' / f'{line}.xml'
        for item in read_voc_xml(path.read_bytes(), path).objects:
            names.setdefault(item.name)
    metric = dict(type='VOCMetric', metric='mAP', eval_mode='area')
    return Data(tuple(sorted(names)), train, val, metric)


# -------------------------------------------------------------------- config


def config_text(
    student: str,
    teacher: Mapping[str, str],
    method: str,
    data: Data | None = None,
) -> str:
    """The file: a stock base, its data if they are others, distillation.

    Args:
        student: The stock config.
        teacher: :func:`teacher_options`.
        method: The short name.
        data: None for the student's own.
    """
    base = student if '::' in student else osp.abspath(student)
    parts = [
        '# Written by tools/distill.py to be edited; train it with train.py.',
        f'_base_ = [{base!r}]',
        '',
    ]
    if data is not None:
        parts += [*_data_lines(load_config(base), data), '']
    distillation = dict(
        teacher=dict(teacher),
        methods={method: dict(type=find_method(method))},
    )
    parts += [
        "runner_type = 'mmkd.DistillationRunner'",
        f'distillation = {_pretty(distillation)}',
    ]
    return '\n'.join(parts) + '\n'


def _pretty(value: Any) -> str:
    return pprint.pformat(value, sort_dicts=False, width=79)


def _data_lines(base: Config, data: Data) -> list[str]:
    for key in ('train_pipeline', 'test_pipeline'):
        dataset = base.train_dataloader.dataset
        if key not in base or dataset.type == 'MultiImageMixDataset':
            raise ConfigError(
                'the student mixes images or names no '
                'train_pipeline/test_pipeline: its data cannot be replaced '
                'by --data. Write a config with your data and give it as '
                '--student.'
            )
    lines = [f'classes = {data.classes!r}']
    model = _with_classes(base.model.to_dict(), len(data.classes))
    if model:
        lines.append(f'model = {_pretty(model)}')
    for loader, split, pipeline in (
        ('train_dataloader', data.train, 'train_pipeline'),
        ('val_dataloader', data.val, 'test_pipeline'),
    ):
        dataset = dict(_delete_=True, **split)
        if loader == 'val_dataloader':
            dataset['test_mode'] = True
        else:
            dataset['filter_cfg'] = dict(filter_empty_gt=True, min_size=1)
            if dataset['type'] == 'VOCDataset':
                dataset['filter_cfg']['bbox_min_size'] = 1
        entries = [f'        {k}={v!r},' for k, v in dataset.items()]
        lines += [
            f'{loader} = dict(',
            '    dataset=dict(',
            *entries,
            '        metainfo=dict(classes=classes),',
            f'        pipeline={{{{_base_.{pipeline}}}}},',
            '    )',
            ')',
        ]
    lines += [
        'test_dataloader = val_dataloader',
        f'val_evaluator = {_pretty(dict(_delete_=True, **data.metric))}',
        'test_evaluator = val_evaluator',
    ]
    return lines


def _with_classes(model: Any, count: int) -> Any:
    """What of a model's config changes with the number of classes."""
    if isinstance(model, list | tuple):
        changed = [_with_classes(each, count) for each in model]
        if not any(changed):
            return None
        result = copy.deepcopy(list(model))
        for each in result:
            if 'num_classes' in each:
                each['num_classes'] = count
        return result
    if not isinstance(model, Mapping):
        return None
    result = {}
    for key, value in model.items():
        if key == 'num_classes' and value != count:
            result[key] = count
        elif found := _with_classes(value, count):
            result[key] = found
    return result
