"""The config that `mmkd distill` writes: a delta on the stock student."""

import copy
import inspect
import os.path as osp
import pprint
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.config import Config

from mmkd.core.method import Method
from mmkd.detectors.source import find_in_model_index, load_config
from mmkd.errors import ConfigError
from mmkd.registry import METHODS, MODELS, TEACHERS
from mmkd.utils import nearest

from .folders import Data

SHORT = {
    'FasterRCNNDistillation': 'frcnn',
    'FeatureHint': 'hint',
    'OneTeacherSeveralStudents': 'one_teacher',
    'SoftLabelDistillation': 'soft_label',
}
P2_TO_P5 = dict(levels=[0, 1, 2, 3])


def _fgd(*weights: float) -> dict[str, float]:
    kinds = ('foreground', 'background', 'attention', 'relation')
    return {f'{k}_weight': w for k, w in zip(kinds, weights, strict=True)}


PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    # yzd-v/MGD: cascade_mask_rcnn_…_distill_faster_rcnn_r50_fpn_2x_coco.py
    'MGD': {'two-stage': P2_TO_P5 | dict(mask_ratio=0.45, loss_weight=5e-7)},
    # yzd-v/FGD: fgd_faster_rcnn_r101_…, fgd_reppoints_r101_…, fgd_fcos_r101_…
    # and fgd_yoloxl_distill_yoloxm_coco.py; its GFL has RetinaNet's
    'FGD': {
        'two-stage': P2_TO_P5 | _fgd(5e-5, 2.5e-5, 5e-5, 5e-7),
        'anchor-free': _fgd(1.6e-3, 8e-4, 8e-4, 8e-6),
        'FCOSHead': dict(temperature=0.8),
        'YOLOXHead': _fgd(2e-3, 1e-3, 1e-3, 1e-5),
    },
    # open-mmlab/mmrazor: pkd_fpn_faster-rcnn_r101_faster-rcnn_r50_2x_coco.py
    'PKD': {'two-stage': P2_TO_P5},
    # open-mmlab/mmrazor: fbkd_fpn_faster-rcnn_r101_faster-rcnn_r50_1x_coco.py
    'FBKD': {'two-stage': P2_TO_P5 | dict(pooling=[8, 4, 2, 2])},
    # megvii-research/mdistiller: detection/model/config.py
    'DKD': {'two-stage': dict(alpha=1.0, beta=0.25, temperature=1.0)},
    # jbwang1997/CrossKD: crosskd_r50_…_r101_…; the weights of its FCOS belong
    # to another loss of boxes and another normaliser
    'CrossKD': {
        'RetinaHead': dict(box_weight=1.0),
        'GFLHead': dict(box_weight=4.0),
        'ATSSHead': dict(box_weight=1.0, quality_weight=1.0),
        'FCOSHead': dict(layer=2),
    },
    # cybercore-co-ltd/CoLAD
    'LAD': {'PAAHead': dict(box_weighting='none')},
    'SoLAD': {'PAAHead': dict(box_weighting='none')},
}
"""What official configs set otherwise than the defaults of a method's class:
for a kind of student (:func:`kind_of`), or a head that both networks have."""
UNSAID: dict[str, dict[str, Any]] = {
    'FeatureHint': dict(loss=dict(type='mmkd.HintLoss')),
    'SoLAD': dict(
        soft=dict(cls_weight=2.0, iou_weight=10.0, box_weight=1.3)
        | dict(min_iou=0.5, gamma=0.5)
    ),
}
"""What None stands for."""


def methods() -> dict[str, type[Method]]:
    """Every registered method by a short name in lower case."""
    METHODS.import_from_location()
    kinds = {cls.__name__: cls for cls in METHODS.module_dict.values()}
    return {
        SHORT.get(name, name.lower()): kinds[name] for name in sorted(kinds)
    }


def find_method(name: str) -> str:
    """The config's ``type`` of a method's short name.

    Raises:
        ConfigError: If there is none; says the nearest.
    """
    known = methods()
    if name not in known:
        raise ConfigError(f'no method "{name}". {nearest(name, known)}')
    if known[name].learns_from != 'teacher':
        raise ConfigError(
            f'{name} ties networks that train together (`peers`), and has no '
            'teacher: see the configs of it.'
        )
    return f'mmkd.{known[name].__name__}'


def teacher_options(name: str, checkpoint: str | None) -> dict[str, str]:
    """The value of ``distillation.teacher`` for what the user names.

    Args:
        name: A name in MMDetection's model index, a config, or the type of a
            registered teacher, such as ``mmkd.FrozenDetector``.
        checkpoint: The weights of a config.

    Raises:
        ConfigError: If the name is unknown, or a config has no checkpoint.
    """
    TEACHERS.import_from_location()
    if name.rpartition('.')[2] in TEACHERS.module_dict:
        return {'type': name}
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


# ------------------------------------------------------------------- options


def kind_of(model: Mapping[str, Any]) -> str:
    """Two-stage, one-stage (with anchors), anchor-free or DETR.

    Args:
        model: A detector's part of its config.
    """
    if 'roi_head' in model:
        return 'two-stage'
    if 'decoder' in model:
        return 'DETR'
    head = model.get('bbox_head') or {}
    anchors = any('anchor_generator' in option for option in head)
    return 'one-stage' if anchors else 'anchor-free'


def published(
    name: str, student: Mapping[str, Any], teacher: Mapping[str, Any]
) -> dict[str, Any]:
    """The entries of :data:`PUBLISHED` for a method and two networks."""
    heads = [
        (m.get('bbox_head') or {}).get('type') for m in (student, teacher)
    ]
    found: dict[str, Any] = {}
    for key in (kind_of(student), heads[0] if heads[0] == heads[1] else None):
        entries = PUBLISHED.get(name.removeprefix('mmkd.'), {})
        found |= entries.get(key or '', {})
    if not student.get('neck'):
        found.pop('levels', None)  # a C4 detector has one
    return found


def options_of(name: str, changed: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a class of mmkd with every option and its value.

    Args:
        name: ``mmkd.X``, a method or a loss.
        changed: What is otherwise than the defaults.
    """
    MODELS.import_from_location()
    classes = {**MODELS.module_dict, **METHODS.module_dict}
    short = name.removeprefix('mmkd.')
    options = defaults(classes[short]) | UNSAID.get(short, {}) | {**changed}
    for key, value in options.items():
        if isinstance(value, Mapping) and 'type' in value:
            options[key] = options_of(value['type'], dict(value))
    return dict(type=name) | options


def defaults(cls: type) -> dict[str, Any]:
    """The options of a class, and those that it hands on to its base."""
    found: dict[str, Any] = {}
    for base in inspect.getmro(cls)[:-1]:
        parameters = inspect.signature(base).parameters.values()
        for parameter in parameters:
            if parameter.kind is parameter.KEYWORD_ONLY:
                found.setdefault(parameter.name, parameter.default)
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    if not getattr(cls, 'adaptable', True):
        del found['adapt']  # it has layers of its own
    return found


# -------------------------------------------------------------------- config


def config_text(
    student: str,
    teacher: Mapping[str, str],
    method: str,
    data: Data | None = None,
    imports: Sequence[str] = (),
) -> str:
    """The file: a stock base, its data if they are others, distillation.

    All options of the method are in it, with their values.

    Args:
        student: The stock config.
        teacher: :func:`teacher_options`.
        method: The short name.
        data: None for the student's own.
        imports: Modules that register methods or teachers of the user's own.
    """
    base = student if '::' in student else osp.abspath(student)
    parts = [
        '# Written by `mmkd distill`, to be edited and given to `mmkd train`.',
        f'_base_ = [{base!r}]',
        '',
    ]
    if imports:
        parts += [f'custom_imports = dict(imports={list(imports)!r})', '']
    config = load_config(base)
    if data is not None:
        parts += [*_data_lines(config, data), '']
    parts += [
        "runner_type = 'mmkd.DistillationRunner'",
        *_distillation_lines(config.model, teacher, method),
    ]
    return '\n'.join(parts) + '\n'


def _distillation_lines(
    student: Mapping[str, Any], teacher: Mapping[str, str], method: str
) -> list[str]:
    name = find_method(method)
    changed = published(name, student, _model_of(teacher))
    about = f'Every option of {name}, which its docstring explains.'
    if changed:
        about += (
            f' Published for such a student ({kind_of(student)}): '
            f'{", ".join(changed)}.'
        )
    options = options_of(name, changed)
    content = dict(teacher=dict(teacher), methods={method: options})
    return [
        textwrap.indent(textwrap.fill(about, 77), '# '),
        f'distillation = {_pretty(content)}',
    ]


def _model_of(teacher: Mapping[str, str]) -> Mapping[str, Any]:
    if 'type' in teacher:
        return {}
    if 'name' in teacher:
        teacher = find_in_model_index(teacher['name'])
    return load_config(teacher['config']).model


def _pretty(value: Any, indent: int = 0) -> str:
    """A literal, a dict with a line for each key."""
    if not isinstance(value, Mapping):
        return pprint.pformat(value, sort_dicts=False, width=79 - indent)
    inner = ' ' * (indent + 4)
    lines = [f'{inner}{k}={_pretty(v, indent + 4)},' for k, v in value.items()]
    return '\n'.join(['dict(', *lines, ' ' * indent + ')'])


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
    entries = {}
    for key, value in model.items():
        if key == 'num_classes' and value != count:
            entries[key] = count
        elif found := _with_classes(value, count):
            entries[key] = found
    return entries
